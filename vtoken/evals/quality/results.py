"""What a run writes: the files of `vtoken eval --out DIR`.

`DIR/requests/K-NAME.jsonl`, one file per run, one line per (task, document), fields of `lmms.records.Request` plus

    pipeline        name of the run: "dense", or the pipeline's; K tells runs of one name apart
    question        what the task asks, without chat template
    target          what the task expects, as it writes it
    score           the document's own number in the task's metric, null where the metric has none per document
    scores          every number the scorer gave for the document
    same_as_dense   whether the answer is the first dense run's, letter by letter
    doc_hash        sha256 of the document, media aside
    media           sha256 over the pictures and frames shown, null without any: questions about one picture share it
    stages          stage (with its layer, "fastv@2") -> milliseconds that its decision took, of the batch; empty for
                    dense

`DIR/results.json`, rewritten after every run:

    schema          "vtoken-eval/1"
    complete        false until the last run is done
    model, command  what was asked for
    conditions      versions, commit, device, dtype, attention, pixels, frames, batch size, limit, seeds
    tasks           name -> metric, scale (what 100 % is), higher_is_better, leaves (the tasks of a group, else itself),
                    docs, hash (sha256 over the documents in order), version and generation options of each leaf
    runs            in the order they ran, the first and the last dense: name, pipeline (YAML, null for dense), requests
                    (file), and tasks: name -> value, of_dense (value / first dense value), metrics (leaf -> every
                    number), same_as_dense (share), visual_tokens, visual_tokens_entry, visual_tokens_mean,
                    input_tokens, new_tokens (means per document), ttft_s, decode_s, preprocess_s (medians over
                    documents), ttft_to_dense (median of the ratios document by document), stages (stage -> median
                    milliseconds), flops (counted, of the prefill of the task's document with the median of visual
                    tokens, which `doc` names: total, language, stages; or `reason` where it cannot be counted)
    cases           documents that pipelines lost against dense, worst first: task, doc, and panels: run's name -> JPEG
                    under `DIR/cases/` with the tokens it kept (dense: the pictures), null where nothing can be drawn
    drift           last dense run against the first: ttft (median ratio), answers_changed (documents)
    speed           what `vtoken bench --json` prints, of a sweep with a speed pass, else null

`vtoken sweep` writes the same, and beside it `DIR/points/KEY.json`: one file per pipeline and task, from which the rest
is put together; KEY is a hash of everything that decides the numbers.

`DIR/scorers/K-NAME/TASK/` holds what a scorer wrote into the folder it ran in, if anything.

Seconds are those of the whole batch a document was in; only at batch size 1 are they the document's own. For a
comparison of speed take `vtoken bench`, which interleaves what it compares.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median
from typing import Any

from vtoken.config import Pipeline, dump
from vtoken.errors import VtokenError
from vtoken.evals.quality.points import Answered, Point, label
from vtoken.evals.shared import whole
from vtoken.evals.shared.dense import DENSE

SCHEMA = "vtoken-eval/1"
MEANS = ("visual_tokens", "visual_tokens_entry", "visual_tokens_mean", "input_tokens", "new_tokens")
MEDIANS = ("preprocess_s", "ttft_s", "decode_s")
Lines = Mapping[tuple[str, int], Mapping[str, Any]]  # by leaf and document


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

    def mean(self, run: Mapping[str, Any], key: str) -> float:
        """Mean of a number over a run's tasks, weighted by their documents."""
        docs = {name: self.tasks[name]["docs"] for name in run["tasks"]}
        return sum(task[key] * docs[name] for name, task in run["tasks"].items()) / sum(docs.values())

    def save(self) -> None:
        """An interrupted run leaves the last whole file."""
        whole.write(self.folder / "results.json", json.dumps(self.to_dict(), indent=1) + "\n")


def assemble(
    folder: Path, model: str, command: str, runs: Sequence[Pipeline], kept: Mapping[Point, Answered | None]
) -> Results | None:
    """results.json and requests/ from the points that were answered; None before the first dense one is. Empty folders
    of scorers go."""
    if not any(file.is_file() for file in folder.glob("scorers/**/*")):
        shutil.rmtree(folder / "scorers", ignore_errors=True)
    answered = {point: found for point, found in kept.items() if found is not None}
    first = {point.task: found for point, found in answered.items() if point.run == 0}
    if not first:
        return None
    about = next(iter(first.values()))["conditions"]
    results = Results(folder, model, command, about, {task: found["about"] for task, found in first.items()})
    dense = {task: _lines(found) for task, found in first.items()}
    (folder / "requests").mkdir(exist_ok=True)
    for k, pipeline in enumerate(runs):
        yaml = None if pipeline is DENSE else dump(pipeline)
        tasks: dict[str, Any] = {}
        lines: list[dict[str, Any]] = []
        for point, found in answered.items():
            if point.run != k or point.task not in first:
                continue
            task, base = point.task, first[point.task]
            if found["about"]["hash"] != base["about"]["hash"]:
                raise VtokenError(f"task {task} gave {pipeline.name} other documents than dense; start in a new folder")
            tasks[task] = {**_summary(found, base["value"], dense[task]), "flops": found["flops"]}
            for line in found["requests"]:
                same = line["answer"] == dense[task][line["task"], line["doc"]]["answer"]
                lines.append({**line, "pipeline": pipeline.name, "same_as_dense": same})
        if tasks:
            file = f"requests/{label(k, pipeline)}.jsonl"
            results.runs.append({"name": pipeline.name, "pipeline": yaml, "requests": file, "tasks": tasks})
            whole.write(folder / file, "".join(json.dumps(line) + "\n" for line in lines))
    results.complete = len(answered) == len(kept)
    if results.complete and len(runs) > 1:
        first_run, last_run = (
            _lines(*(found for point, found in answered.items() if point.run == k)) for k in (0, len(runs) - 1)
        )
        changed = sum(line["answer"] != first_run[key]["answer"] for key, line in last_run.items())
        results.drift = {"ttft": _ttft_ratio(last_run, first_run), "answers_changed": changed}
    results.save()
    return results


def _lines(*points: Answered) -> Lines:
    return {(line["task"], line["doc"]): line for found in points for line in found["requests"]}


def _summary(found: Answered, base: float | None, dense: Lines) -> dict[str, Any]:
    """A run on one task, against the dense value and lines."""
    value, lines = found["value"], found["requests"]
    stages = dict.fromkeys(name for line in lines for name in line["stages"])
    return {
        "value": value,
        "of_dense": value / base if value is not None and base else None,
        "metrics": found["metrics"],
        "same_as_dense": fmean(line["answer"] == dense[line["task"], line["doc"]]["answer"] for line in lines),
        **{name: fmean(line[name] for line in lines) for name in MEANS},
        **{name: median(line[name] for line in lines) for name in MEDIANS},
        "ttft_to_dense": _ttft_ratio(_lines(found), dense),
        "stages": {name: median(line["stages"][name] for line in lines if name in line["stages"]) for name in stages},
    }


def _ttft_ratio(lines: Lines, dense: Lines) -> float:
    return median(lines[key]["ttft_s"] / dense[key]["ttft_s"] for key in lines)
