"""One point of a sweep asked and kept in a file, and the files put together as `vtoken eval` writes its results."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import VtokenError
from vtoken.evals.lmms import costs
from vtoken.evals.lmms.harness import Harness, Leaf, Scored, whoever
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.plan import Point, Sweep
from vtoken.evals.lmms.records import Cost, Reply, Request
from vtoken.evals.lmms.run import DENSE, Results, about_task, conditions, request_lines, summary, ttft_ratio

Answered = Mapping[str, Any]  # what a point's file holds


def ask(model: VtokenModel, harness: Harness, point: Point, limit: int | None, folder: Path) -> Answered:
    """Everything that a point's file holds: conditions, the task, its score and a line per document."""
    model.use(point.pipeline)
    try:
        scored = harness.run(model, point.task, limit, folder / "scorers" / f"{point.run}" / point.task)
        found = {(r.task, r.doc): r for r in model.requests if r.repeat == 0}
        document = None
        with suppress(KeyError):  # another process may have answered it
            document = costs.typical(model, list(found.values()))
        counted = costs.flops(model.asker.model.config, point.pipeline, whoever(document))
    finally:
        model.use(DENSE)
    return {
        "conditions": conditions(model, limit),
        "about": about_task(point.task, scored),
        "value": scored.value,
        "flops": counted,
        "metrics": {name: leaf.metrics for name, leaf in scored.leaves.items()},
        "requests": list(request_lines(point.pipeline.name, point.task, scored, found, found)),
    }


def file_of(folder: Path, key: str) -> Path:
    return folder / "points" / f"{key}.json"


def save(folder: Path, key: str, what: Any) -> None:
    """Writes beside, then renames: a file that is there is whole."""
    file = file_of(folder, key)
    part = file.with_suffix(".part")
    part.write_text(json.dumps(what) + "\n", encoding="utf-8")
    part.replace(file)


def load(folder: Path, key: str) -> Any:
    """What is kept under a key, None if nothing is."""
    with suppress(FileNotFoundError):
        return json.loads(file_of(folder, key).read_text(encoding="utf-8"))


def assemble(
    folder: Path, sweep: Sweep, runs: Sequence[Pipeline], points: Sequence[Point], command: str
) -> Results | None:
    """results.json and requests/ from the points that are there; None before the first dense one is.

    Raises:
        VtokenError: a task whose documents are not those of its dense run.
    """
    kept = {point: load(folder, point.key) for point in points}
    first = {p.task: found for p, found in kept.items() if p.run == 0 and found is not None}
    if not first:
        return None
    about = next(iter(first.values()))["conditions"]
    results = Results(folder, sweep.model, command, about, {task: found["about"] for task, found in first.items()})
    dense = {task: _requests(found) for task, found in first.items()}
    (folder / "requests").mkdir(exist_ok=True)
    for k, pipeline in enumerate(runs):
        name = re.sub(r"[^A-Za-z0-9._+=%-]+", "-", pipeline.name).strip("-")
        yaml = None if pipeline is DENSE else config.dump(pipeline)
        row: dict[str, Any] = {"name": pipeline.name, "pipeline": yaml, "requests": f"requests/{k}-{name}.jsonl"}
        row["tasks"] = {}
        lines: list[dict[str, Any]] = []
        for point, found in kept.items():
            if point.run != k or found is None or point.task not in first:
                continue
            if found["about"]["hash"] != first[point.task]["about"]["hash"]:
                raise VtokenError(f"task {point.task} gave {name} other documents than dense; start in a new folder")
            scored = Scored(found["about"]["metric"], found["value"], _leaves(found))
            base = results.runs[0]["tasks"][point.task] if k else None
            measured = summary(scored, _requests(found), dense[point.task], base)
            row["tasks"][point.task] = {**measured, "flops": found["flops"]}
            for line in found["requests"]:
                before = dense[point.task][line["task"], line["doc"]].reply.text
                lines.append({**line, "pipeline": pipeline.name, "same_as_dense": line["answer"] == before})
        if row["tasks"]:
            results.runs.append(row)
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (folder / row["requests"]).write_text(text, encoding="utf-8")
    results.complete = all(found is not None for found in kept.values())
    if results.complete and len(runs) > 1:
        last = {k: r for p, found in kept.items() if p.run == len(runs) - 1 for k, r in _requests(found).items()}
        both = {key: request for each in dense.values() for key, request in each.items()}
        changed = sum(last[key].reply.text != both[key].reply.text for key in both)
        results.drift = {"ttft": ttft_ratio(last, both), "answers_changed": changed}
    results.save()
    return results


def _leaves(found: Answered) -> dict[str, Leaf]:
    return {name: Leaf(metrics, (), {}, {}) for name, metrics in found["metrics"].items()}


def _requests(found: Answered) -> dict[tuple[str, int], Request]:
    return {(line["task"], line["doc"]): _request(line) for line in found["requests"]}


def _request(line: Mapping[str, Any]) -> Request:
    cost = Cost(**{field.name: line[field.name] for field in fields(Cost)})
    own = {field.name: line[field.name] for field in fields(Request) if field.name in line}
    return Request(reply=Reply(line["answer"], cost), **own)
