"""One point of a sweep asked and kept in a file, and the files put together as `vtoken eval` writes its results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import Any

from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import VtokenError
from vtoken.evals.lmms.harness import Harness, Leaf, Scored, whoever
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.records import Cost, Reply, Request
from vtoken.evals.quality import costs
from vtoken.evals.quality.plan import Point, Sweep
from vtoken.evals.quality.run import DENSE, Results, about_task, conditions, request_lines, summary, ttft_ratio
from vtoken.evals.shared import whole

Answered = Mapping[str, Any]  # what a point's file holds
ABOUT = {"metric", "scale", "higher_is_better", "docs", "hash", "leaves"}


def ask(model: VtokenModel, harness: Harness, point: Point, limit: int | None, folder: Path) -> Answered:
    """Everything that a point's file holds: conditions, the task, its score and a line per document."""
    model.use(point.pipeline)
    try:
        scored = harness.run(model, point.task, limit, folder / "scorers" / f"{point.run}" / point.task)
        found = {(r.task, r.doc): r for r in model.requests if r.repeat == 0}
        document = None
        with suppress(KeyError):  # another process may have answered it
            document = costs.typical(model, list(found.values()))
        counted = costs.flops(model.generator.model.config, point.pipeline, whoever(document))
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
    """Keeps plain data under a key, whole or not at all."""
    whole.write(file_of(folder, key), json.dumps(what) + "\n")


def load(folder: Path, key: str, fits: Callable[[Any], bool]) -> Any:
    """What is kept under a key, None if nothing is or, with a warning, nothing that `fits`."""
    return whole.kept(file_of(folder, key), fits)


def is_point(found: Any) -> bool:
    """Whether it is what `ask` gave, as far as `assemble` reads it."""
    try:
        costs = [vars(request.reply.cost) for request in _requests(found).values()]
        numbers = [n for cost in costs for n in (*cost["stages"].values(), *cost.values()) if n is not cost["stages"]]
        return (
            all(type(n) in (int, float) for n in numbers)
            and all(isinstance(line["answer"], str) and "score" in line for line in found["requests"])
            and ABOUT <= set(found["about"])
            and all(isinstance(found[key], dict) for key in ("conditions", "flops", "metrics"))
            and (found["value"] is None or type(found["value"]) in (int, float))
            and len(costs) > 0
        )
    except (KeyError, TypeError, AttributeError):
        return False


def is_cases(found: Any) -> bool:
    """Whether it is what `regressions.draw` gave, with pictures in their folder."""
    try:
        names = [name for case in found for name in case["panels"].values() if name is not None]
        known = isinstance(found, list) and all({"task", "doc"} <= set(case) for case in found)
        return known and all(re.fullmatch(r"cases/[0-9-]+\.jpg", name) for name in names)
    except (KeyError, TypeError, AttributeError):
        return False


def is_speed(found: Any) -> bool:
    """Whether it is what `bench` gave, as far as a report reads it."""
    try:
        return all(
            "name" in row and "to_dense" in row and row["milliseconds"]["ttft"]["median"] for row in found["rows"]
        )
    except (KeyError, TypeError, AttributeError):
        return False


def assemble(
    folder: Path, sweep: Sweep, runs: Sequence[Pipeline], points: Sequence[Point], command: str
) -> Results | None:
    """results.json and requests/ from the points that are there; None before the first dense one is.

    Raises:
        VtokenError: a task whose documents are not those of its dense run.
    """
    kept = {point: load(folder, point.key, is_point) for point in points}
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
            whole.write(folder / row["requests"], "".join(json.dumps(line) + "\n" for line in lines))
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
