"""A made-up folder of `vtoken eval`, so that reports are tested without a model and without lmms-eval."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

MODEL = "made/up-model"
DENSE = {"visual": 100.0, "flops": 1000, "ttft": 0.4}


def run(name: str, stages: str | None, scores: Mapping[str, Sequence[float | None]], **cost: float) -> dict[str, Any]:
    return {"name": name, "stages": stages, "scores": scores, **DENSE, **cost}


def write(
    folder: Path,
    runs: Sequence[dict[str, Any]],
    pictures: int,
    higher: bool = True,
    cases: Sequence[Mapping[str, Any]] = (),
    scale: float = 1.0,
) -> Path:
    """Files as `vtoken eval` writes them. A task's value is the mean of its scores; document k shows picture k %
    pictures."""
    (folder / "requests").mkdir(parents=True)
    (folder / "cases").mkdir()
    Image.new("RGB", (8, 8), (200, 40, 40)).save(folder / "cases" / "0-0.jpg")
    base = runs[0]["scores"]
    listed = []
    for k, each in enumerate(runs):
        tasks, lines = {}, []
        for task, scores in each["scores"].items():
            means = [_mean(found) for found in (scores, base[task])]
            tasks[task] = {
                "value": scale * means[0],
                "of_dense": means[0] / means[1],
                "metrics": {task: {"hit": scale * means[0]}},
                "visual_tokens": DENSE["visual"],
                "visual_tokens_entry": each["visual"],
                "visual_tokens_mean": each["visual"] / 2,
                "ttft_s": each["ttft"],
                "ttft_to_dense": each["ttft"] / DENSE["ttft"],
                "stages": {"toy@2": 1.5} if each["stages"] else {},
                "flops": {"doc": 0, "total": each["flops"], "language": each["flops"] // 2, "stages": 7},
            }
            lines += [
                {
                    "task": task,
                    "doc": doc,
                    "score": score,
                    "answer": f"{score}",
                    "question": f"what is <{doc}>?",
                    "target": "t",
                    "media": f"picture{doc % pictures}",
                }
                for doc, score in enumerate(scores)
            ]
        file = f"requests/{k}.jsonl"
        (folder / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
        pipeline = f"stages:\n- {each['stages']}" if each["stages"] else None
        listed.append({"name": each["name"], "pipeline": pipeline, "requests": file, "tasks": tasks})
    results = {
        "schema": "vtoken-eval/1",
        "model": MODEL,
        "command": "vtoken eval made/up-model",
        "complete": True,
        "conditions": {"device": "toy CPU", "dtype": "float32", "batch_size": 1, "versions": "none", "limit": None},
        "drift": {"ttft": 1.1, "answers_changed": 0},
        "tasks": {
            task: {
                "metric": "hit",
                "scale": scale,
                "higher_is_better": higher,
                "docs": len(scores),
                "hash": "0" * 64,
                "leaves": {task: {"version": 1.0}},
            }
            for task, scores in base.items()
        },
        "runs": listed,
        "cases": list(cases),
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def _mean(scores: Sequence[float | None]) -> float:
    known = [score for score in scores if score is not None]
    return sum(known) / len(known)
