"""A run of `vtoken eval` read back from its folder: paired statistics per task, costs per pipeline and Pareto fronts,
as plain data."""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from types import NoneType
from typing import Any

from vtoken.config import yaml_source as source
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.quality.results import SCHEMA
from vtoken.evals.shared import whole
from vtoken.evals.statistics import agreement, paired, questions_needed

POINT = 0.01  # of the share of right answers
COSTS = {"tokens": "visual tokens", "flops_ratio": "FLOPs / dense", "ttft_ratio": "TTFT / dense"}
Line = Mapping[str, Any]
# What is read of results.json, of a run in it, and of a line of answers.
PARTS: dict[str, Any] = {
    "model": str,
    "command": str,
    "complete": bool,
    "conditions": dict,
    "drift": (dict, NoneType),
    "tasks": dict,
    "runs": list,
    "cases": list,
}
RUN: dict[str, Any] = {"name": str, "pipeline": (str, NoneType), "requests": str, "tasks": dict}
LINE = {"task", "doc", "score", "answer", "question", "target", "media"}


@dataclass(frozen=True)
class Evaluation:
    """A folder of results: `results` is what results.json holds, `lines` the lines of every run."""

    folder: Path
    results: dict[str, Any]
    lines: list[list[dict[str, Any]]]


def read(folder: Path) -> Evaluation:
    """Reads what `vtoken eval --out DIR` wrote; runs that were not finished are left out."""
    file = folder / "results.json"
    if not file.is_file():
        raise VtokenError(f"no results.json in {folder}; give the folder that `vtoken eval --out DIR` wrote")
    results = whole.read(file)
    schema = results.get("schema") if isinstance(results, dict) else None
    if schema != SCHEMA:
        raise VtokenError(f"{file} has schema {reprlib.repr(schema)}, this vtoken reads {SCHEMA!r}")
    if odd := _missing(results, PARTS):
        raise VtokenError(f"{file} is not as `vtoken eval` writes it: {', '.join(odd)} missing, or of another kind")
    if any(_missing(run, RUN) for run in results["runs"]):
        raise VtokenError(f"{file} is not as `vtoken eval` writes it: a run needs {', '.join(RUN)}")
    results["runs"] = [run for run in results["runs"] if set(run["tasks"]) == set(results["tasks"])]
    if not results["runs"] or not results["tasks"]:
        raise VtokenError(f"{folder} holds no finished run; the dense one has to finish at least")
    return Evaluation(folder, results, [_lines(whole.inside(folder, run["requests"], file)) for run in results["runs"]])


def _missing(found: Any, kinds: Mapping[str, Any]) -> list[str]:
    """The keys that a mapping has not, or with a value of another kind."""
    if not isinstance(found, dict):
        return list(kinds)
    return [key for key, kind in kinds.items() if not isinstance(found.get(key, NotImplemented), kind)]


def _lines(file: Path) -> list[dict[str, Any]]:
    """The answers of a run."""
    try:
        lines = [json.loads(row) for row in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise VtokenError(f"{file} cannot be read line by line as JSON: {error}") from error
    for number, line in enumerate(lines, 1):
        if not isinstance(line, dict) or not set(line) >= LINE:
            raise VtokenError(
                f"{file}, line {number} is not as `vtoken eval` writes it: it needs {', '.join(sorted(LINE))}"
            )
    return lines


def analyse(evaluation: Evaluation) -> dict[str, Any]:
    """Everything a report shows, plain data.

    Returns:
        `model`, `complete`, `conditions`, `drift`; `benched`: whether times are those of a speed pass, else of the
        answers; `tasks`: name -> metric, scale, docs, pictures; `pipelines`: one dict per pipeline, dense first (its
        last run is only drift): name, method, tokens (averaged over layers), entry, dense_tokens, quality and low, high
        (mean over tasks of the share of dense that is left, its interval taking tasks for independent), same
        (agreement), ttft, ttft_ratio, ttft_low and ttft_high (quartiles of the ratio, of a speed pass), ttft_asked (of
        the answers), flops, flops_ratio, language_ratio, stages, fronts; per task the same and, against dense, what
        `statistics.paired` says. Shares in 0..1, seconds, None where a number does not exist.
    """
    try:
        return _found(evaluation)
    except (KeyError, TypeError, AttributeError, StopIteration, ConfigError) as error:
        file = evaluation.folder / "results.json"
        raise VtokenError(f"{file} is not as `vtoken eval` writes it ({type(error).__name__}: {error})") from error


def _found(evaluation: Evaluation) -> dict[str, Any]:
    results = evaluation.results
    runs = [k for k, run in enumerate(results["runs"]) if k == 0 or run["pipeline"] is not None]
    rows = [_pipeline(evaluation, k) for k in runs]
    for cost in COSTS:
        known = [row for row in rows if row[cost] is not None and row["quality"] is not None]
        for k in front([(row[cost], row["quality"]) for row in known]):
            known[k]["fronts"].append(cost)
    return {
        **{key: results[key] for key in ("model", "command", "complete", "conditions", "drift")},
        "benched": results.get("speed") is not None,
        "tasks": {
            name: {
                **about,
                "pictures": len({line["media"] for line in _of(evaluation, 0, name) if line["media"] is not None}),
            }
            for name, about in results["tasks"].items()
        },
        "pipelines": rows,
    }


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (cost, quality) that no other dominates, by cost. Of points that are equal all stay.

    A point dominates another if it costs no more and is no worse, and one of both is strictly better.
    """
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1]))
    found: list[int] = []
    for k in order:
        if not found or points[k][1] > points[found[-1]][1] or points[k] == points[found[-1]]:
            found.append(k)
    return found


def _pipeline(evaluation: Evaluation, k: int) -> dict[str, Any]:
    run = evaluation.results["runs"][k]
    tasks = {name: _task(evaluation, k, name) for name in run["tasks"]}
    quality = [task["of_dense"] for task in tasks.values() if task["of_dense"] is not None]
    spread = [task["interval"] for task in tasks.values() if task["interval"] is not None]
    value = fmean(quality) if len(quality) == len(tasks) else None
    low = high = None
    if value is not None and len(spread) == len(tasks):
        below, above = (math.hypot(*(s[0] - s[end] for s in spread)) / len(spread) for end in (1, 2))
        low, high = value - below, value + above
    return {
        "name": run["name"],
        "method": _method(run),
        "pipeline": run["pipeline"],
        "quality": value,
        "low": low,
        "high": high,
        "tokens": _mean(tasks, "visual_tokens_mean"),
        "entry": _mean(tasks, "visual_tokens_entry"),
        "dense_tokens": _mean(tasks, "visual_tokens"),
        "same": _mean(tasks, "same"),
        **_times(evaluation, run["name"], tasks),
        **{key: _mean(tasks, key) for key in ("flops", "flops_ratio", "language_ratio", "stage_flops")},
        "stages": _stages(run["tasks"]),
        "fronts": [],
        "tasks": tasks,
    }


def _times(evaluation: Evaluation, name: str, tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float | None]:
    asked = _mean(tasks, "ttft_s")
    speed = evaluation.results.get("speed")
    if speed is None:
        times = (asked, _mean(tasks, "ttft_to_dense"), None, None)
    else:
        row = next(row for row in speed["rows"] if row["name"] == name)
        spread = (row["to_dense"] or {}).get("ttft") or {"median": 1.0, "low": None, "high": None}
        times = (row["milliseconds"]["ttft"]["median"] / 1e3, spread["median"], spread["low"], spread["high"])
    return {**dict(zip(("ttft", "ttft_ratio", "ttft_low", "ttft_high"), times, strict=True)), "ttft_asked": asked}


def sign(about: Mapping[str, Any]) -> float:
    """1 for a task of results.json, or -1 where a lower score is better."""
    return 1.0 if about["higher_is_better"] else -1.0


def loss(mine: Line, base: Line, signs: Mapping[str, float]) -> float:
    """By how much a document's score is worse than the dense model's; 0 where one of them has none.

    Args:
        signs: task -> its `sign`.
    """
    if None in (mine["score"], base["score"]):
        return 0.0
    return signs[base["task"]] * (base["score"] - mine["score"])


def _method(run: Mapping[str, Any]) -> str:
    """Names of the stages: pipelines of one method, at several budgets, make one line of a plot."""
    stages = source.parse(run["pipeline"])[0]["stages"] if run["pipeline"] else []
    return "+".join(stage if isinstance(stage, str) else next(iter(stage)) for stage in stages) or run["name"]


def _mean(tasks: Mapping[str, Mapping[str, Any]], key: str) -> float | None:
    """Every task counts alike; None if one has no such number."""
    values = [task[key] for task in tasks.values()]
    return None if None in values else fmean(values)


def _stages(tasks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of every decision, medians over documents, averaged over the tasks that have it."""
    names = dict.fromkeys(name for task in tasks.values() for name in task["stages"])
    return {name: fmean(t["stages"][name] for t in tasks.values() if name in t["stages"]) / 1e3 for name in names}


def _of(evaluation: Evaluation, k: int, task: str) -> list[dict[str, Any]]:
    leaves = evaluation.results["tasks"][task]["leaves"]
    return [line for line in evaluation.lines[k] if line["task"] in leaves]


def _task(evaluation: Evaluation, k: int, task: str) -> dict[str, Any]:
    runs = evaluation.results["runs"]
    found, base = runs[k]["tasks"][task], runs[0]["tasks"][task]
    about = evaluation.results["tasks"][task]
    of_dense = found["of_dense"] if about["higher_is_better"] else None
    mine, theirs = _of(evaluation, k, task), _of(evaluation, 0, task)
    counted, dense = found["flops"], base["flops"]
    known = "total" in counted and "total" in dense
    return {
        **{key: found[key] for key in ("value", "ttft_s", "ttft_to_dense")},
        **{key: found[key] for key in ("visual_tokens", "visual_tokens_entry", "visual_tokens_mean")},
        "of_dense": of_dense,
        "same": agreement([line["answer"] for line in mine], [line["answer"] for line in theirs]),
        "flops": counted["total"] if known else None,
        "flops_ratio": counted["total"] / dense["total"] if known else None,
        "language_ratio": counted["language"] / dense["language"] if known else None,
        "stage_flops": counted["stages"] if known else None,
        "no_flops": None if known else counted.get("reason", dense.get("reason")),
        **_against(mine if k else [], theirs if k else [], sign(about), of_dense),
    }


def _against(mine: Sequence[Line], theirs: Sequence[Line], sign: float, of_dense: float | None) -> dict[str, Any]:
    """Paired statistics over the documents that both scored."""
    pairs = [(a, b) for a, b in zip(mine, theirs, strict=True) if None not in (a["score"], b["score"])]
    empty = dict.fromkeys(("interval", "difference", "lost", "won", "p", "needed"))
    if not pairs:  # Dense itself, or a task that scores nothing but the whole.
        return {**empty, "scored": 0, "own_mean": True}
    # Without a picture a question stands for itself.
    clusters = [b["media"] or (b["task"], b["doc"]) for _, b in pairs]
    found = paired([sign * a["score"] for a, _ in pairs], [sign * b["score"] for _, b in pairs], clusters)
    share = None if found.lost is None or found.won is None else (found.lost + found.won) / len(pairs)
    # The scorer's number may be another function of the answers than the mean (F1, sums over categories).
    own = of_dense is None or found.of_dense is None or abs(found.of_dense.value - of_dense) < POINT / 2
    return {
        "scored": len(pairs),
        "interval": None if found.of_dense is None else list(found.of_dense),
        "difference": list(found.difference),
        "lost": found.lost,
        "won": found.won,
        "p": found.p,
        "needed": questions_needed(POINT, share) if share is not None and share >= POINT else None,
        "own_mean": own,
    }
