"""Pipelines x tasks with the model loaded once, dense first and last. What it writes is described in `records`."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.lmms.harness import Harness, Scored, options, ranks
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.records import SCHEMA, Request
from vtoken.evals.lmms.suites import KNOWN, document_score
from vtoken.evals.quality import costs, regressions
from vtoken.evals.shared import whole
from vtoken.evals.speed.latency import machine

DENSE = Pipeline("dense", "original", ())
MEANS = ("visual_tokens", "visual_tokens_entry", "visual_tokens_mean", "input_tokens", "new_tokens")
MEDIANS = ("preprocess_s", "ttft_s", "decode_s")
Key = tuple[str, int]  # leaf and document


@dataclass
class Results:
    """What `DIR/results.json` holds; `save` writes it."""

    folder: Path
    model: str
    command: str
    conditions: dict[str, Any]
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)
    cases: list[dict[str, Any]] = field(default_factory=list)
    drift: dict[str, Any] | None = None
    speed: dict[str, Any] | None = None
    complete: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return {"schema": SCHEMA, **{name: value for name, value in vars(self).items() if name != "folder"}}

    def save(self) -> None:
        """An interrupted run leaves the last whole file."""
        whole.write(self.folder / "results.json", json.dumps(self.to_dict(), indent=1) + "\n")


def with_dense(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Dense, the pipelines, dense. One without stages is dense itself.

    Raises:
        ConfigError: two different pipelines of one name.
    """
    named: dict[str, Pipeline] = {}
    for pipeline in pipelines:
        if not pipeline.stages and pipeline.anyres == "model":
            continue
        if named.setdefault(pipeline.name, pipeline) != pipeline:
            raise ConfigError(f"two pipelines are called {pipeline.name!r}; rename one file")
    if DENSE.name in named:
        raise ConfigError("a pipeline cannot be called 'dense', which is the stock model; rename its file")
    return [DENSE, *named.values(), DENSE] if named else [DENSE]


def evaluate(
    model: VtokenModel,
    pipelines: Sequence[Pipeline],
    harness: Harness,
    folder: Path,
    limit: int | None = None,
    command: str = "",
    progress: Callable[[str], None] = lambda what: None,
) -> Results:
    """Asks every task under every pipeline and writes DIR/results.json and DIR/requests/.

    Args:
        limit: first documents of every task (of a group: of every part) only; None is all.
        progress: called with what comes next.

    Raises:
        ConfigError: a limit below 1, several processes, a folder that holds results already, pipelines that cannot be told apart.
        UnsupportedError: a stage that the model cannot serve, before anything is asked.
        VtokenError: a task whose scorer fails.
        Whatever the model raises: what was finished before stays in the folder, with `complete` false.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1 document, not {limit}")
    if ranks()[1] > 1:
        raise ConfigError("vtoken eval is one process; under torchrun or accelerate launch take vtoken sweep")
    if (folder / "results.json").exists():
        raise ConfigError(f"{folder} holds results already; give another folder with --out")
    runs = with_dense(pipelines)
    for pipeline in runs:
        model.use(pipeline)
    folder = folder.resolve()
    (folder / "requests").mkdir(parents=True, exist_ok=True)
    results = Results(folder, model.pretrained, command, conditions(model, limit))
    first: dict[Key, Request] = {}
    answered: list[dict[Key, Request]] = []
    lines: list[list[dict[str, Any]]] = []
    documents: dict[str, costs.Typical | str] = {}
    try:
        for k, pipeline in enumerate(runs):
            name = re.sub(r"[^A-Za-z0-9._+=%-]+", "-", pipeline.name).strip("-")
            file = folder / "requests" / f"{k}-{name}.jsonl"
            run: dict[str, Any] = {
                "name": pipeline.name,
                "pipeline": None if pipeline is DENSE else config.dump(pipeline),
                "requests": f"requests/{file.name}",
                "tasks": {},
            }
            results.runs.append(run)
            asked: dict[Key, Request] = {}
            lines.append([])
            with file.open("w", encoding="utf-8") as out:
                for task in harness.tasks:
                    progress(f"{pipeline.name}: {task}")
                    model.use(pipeline)
                    scored = harness.run(model, task, limit, folder / "scorers" / f"{k}-{name}" / task)
                    found = {(r.task, r.doc): r for r in model.requests if r.repeat == 0}
                    asked |= found
                    if k == 0:
                        first |= found
                        results.tasks[task] = about_task(task, scored)
                        documents[task] = costs.typical(model, list(found.values()))
                    elif scored.hash != results.tasks[task]["hash"]:
                        raise VtokenError(
                            f"task {task} gave other documents than in the dense run; its data changed meanwhile"
                        )
                    dense = results.runs[0]["tasks"].get(task)
                    counted = costs.flops(model.generator.model.config, pipeline, documents[task])
                    run["tasks"][task] = {**summary(scored, found, first, dense), "flops": counted}
                    new = list(request_lines(pipeline.name, task, scored, found, first))
                    out.writelines(json.dumps(line) + "\n" for line in new)
                    lines[-1] += new
            answered.append(asked)
            results.save()
        if len(runs) > 1:
            changed = sum(answered[-1][key].reply.text != answered[0][key].reply.text for key in first)
            results.drift = {"ttft": ttft_ratio(answered[-1], first), "answers_changed": changed}
        results.complete = True
        results.save()
        pruned = {pipeline.name: found for pipeline, found in zip(runs[1:-1], lines[1:-1], strict=True)}
        progress("pictures of what was lost")
        chosen = regressions.worst(lines[0], pruned, regressions.directions(results.tasks))
        results.cases = regressions.draw(model, runs[:-1] or runs, chosen, folder)
        results.save()
    finally:
        model.use(DENSE)
        for empty in [*folder.glob("scorers/*"), folder / "scorers"]:
            with suppress(OSError):
                empty.rmdir()
    return results


def conditions(model: VtokenModel, limit: int | None) -> dict[str, Any]:
    """What a reader needs to run it again."""
    about = {key: value for key, value in model.about().items() if key not in ("pretrained", "pipeline")}
    held = model.generator.model.config
    return {
        **machine(model.generator.model),
        **about,
        "weights": getattr(held, "_commit_hash", None),
        "lmms_eval": version("lmms-eval"),  # lmms-eval calls itself "unknown" when pip installed it.
        "datasets": version("datasets"),
        "commit": commit(),
        "limit": limit,
        "generation": "as the tasks say; seeds 0, 1234 and 1234 (Python, numpy, torch), set for every task",
    }


def commit() -> str | None:
    """The commit of the checkout that vtoken runs from, with "+" if files differ from it; None where it is installed from a wheel."""
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, check=True).stdout

    try:
        if not git("ls-files", str(here / "run.py")):
            return None
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def about_task(task: str, scored: Scored) -> dict[str, Any]:
    higher = [leaf.higher_is_better.get(scored.metric or "", True) for leaf in scored.leaves.values()]
    return {
        "metric": scored.metric,
        "scale": KNOWN[task].scale if task in KNOWN else None,
        "higher_is_better": all(higher),
        "docs": sum(len(leaf.samples) for leaf in scored.leaves.values()),
        "hash": scored.hash,
        "leaves": {name: options(leaf) for name, leaf in scored.leaves.items()},
    }


def summary(
    scored: Scored, found: dict[Key, Request], first: dict[Key, Request], dense: dict[str, Any] | None
) -> dict[str, Any]:
    each = [request.reply.cost for request in found.values()]
    base = scored.value if dense is None else dense["value"]
    stages = dict.fromkeys(name for cost in each for name in cost.stages)
    return {
        "value": scored.value,
        "of_dense": scored.value / base if scored.value is not None and base else None,
        "metrics": {name: leaf.metrics for name, leaf in scored.leaves.items()},
        "same_as_dense": fmean(found[key].reply.text == first[key].reply.text for key in found),
        **{name: fmean(getattr(cost, name) for cost in each) for name in MEANS},
        **{name: median(getattr(cost, name) for cost in each) for name in MEDIANS},
        "ttft_to_dense": ttft_ratio(found, first),
        "stages": {name: median(cost.stages[name] for cost in each if name in cost.stages) for name in stages},
    }


def ttft_ratio(found: dict[Key, Request], first: dict[Key, Request]) -> float:
    return median(found[key].reply.cost.ttft_s / first[key].reply.cost.ttft_s for key in found)


def request_lines(
    pipeline: str, task: str, scored: Scored, found: dict[Key, Request], first: dict[Key, Request]
) -> Iterator[dict[str, Any]]:
    for name, leaf in scored.leaves.items():
        known = {metric for metric in leaf.higher_is_better}
        for sample in leaf.samples:
            request = found[name, int(sample["doc_id"])]
            scores = {metric: sample[metric] for metric in sorted(known & set(sample))}
            line = {
                "pipeline": pipeline,
                **request.to_dict(),
                "question": sample["arguments"][0],
                "target": sample["target"],
                "score": document_score(task, sample.get(scored.metric or "")),
                "scores": scores,
                "same_as_dense": request.reply.text == first[name, request.doc].reply.text,
                "doc_hash": sample["doc_hash"],
            }
            yield json.loads(json.dumps(line, default=str))
