"""One pipeline on one task: named, asked, and kept in a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

import vtoken
from vtoken.config import Pipeline, dump
from vtoken.evals.lmms.records import Cost, Request
from vtoken.evals.lmms.suites import KNOWN, document_score, expand
from vtoken.evals.quality import costs
from vtoken.evals.quality.options import Sweep
from vtoken.evals.shared import whole
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.identity import commit, digest, digest_files, named_files, weights
from vtoken.evals.shared.machine import machine

if TYPE_CHECKING:  # They need lmms-eval.
    from vtoken.evals.lmms.harness import Harness, Scored
    from vtoken.evals.lmms.model import VtokenModel

Answered = Mapping[str, Any]  # what a point's file holds
ABOUT = {"metric", "scale", "higher_is_better", "docs", "hash", "leaves"}


@dataclass(frozen=True)
class Point:
    """One pipeline on one task.

    Attributes:
        run: number of the pipeline; the first and the last are dense.
        key: names the point's file; the same if and only if everything is that decides its numbers.
    """

    run: int
    pipeline: Pipeline
    task: str
    key: str = ""


def points(sweep: Sweep, runs: Sequence[Pipeline], commit: str | None) -> list[Point]:
    """Every pipeline on every task, in this order."""
    common = {
        **sweep.model_dump(mode="json", include={"prompts", "limit"}),
        **sweep.model_args(),
        "pretrained": sweep.model,
        "device": sweep.device,
        "weights": weights(sweep.model, sweep.revision),
        "include": [digest_files(sorted(f for f in folder.rglob("*") if f.is_file())) for folder in sweep.include],
        "versions": [vtoken.__version__, commit, torch.__version__, transformers.__version__],
    }
    last = len(runs) - 1

    def point(k: int, pipeline: Pipeline, task: str) -> Point:
        # The last dense run asks again what the first did; a pipeline's place in the list does not matter.
        own = [dump(pipeline), named_files(pipeline), task, "last" if k == last > 0 else "first"]
        return Point(k, pipeline, task, digest(common, own))

    return [point(k, pipeline, task) for k, pipeline in enumerate(runs) for task in expand(sweep.tasks)]


def label(run: int, pipeline: Pipeline) -> str:
    """Number and name of a run, as its files are called."""
    return f"{run}-{re.sub(r'[^A-Za-z0-9._+=%-]+', '-', pipeline.name).strip('-')}"


def ask(model: VtokenModel, harness: Harness, point: Point, limit: int | None, folder: Path) -> Answered:
    """Everything that a point's file holds: conditions, the task, its score and a line per document."""
    from vtoken.evals.lmms.harness import everyone, whoever

    model.use(point.pipeline)
    try:
        scored = harness.run(
            model, point.task, limit, folder / "scorers" / label(point.run, point.pipeline) / point.task
        )
        found = {(r.task, r.doc): r for r in model.requests if r.repeat == 0}
        model.use(DENSE)
        counts = {key: request.reply.cost.visual_tokens for key, request in found.items()}
        if point.pipeline.anyres != "model":
            for share in everyone(costs.cut_anew(model, counts)):
                counts |= share
        document = None
        with suppress(KeyError):  # another process may have answered it
            document = costs.typical(model, counts)
        counted = costs.flops(model.generator.model.config, point.pipeline, whoever(document))
    finally:
        model.use(DENSE)
    return {
        "conditions": conditions(model, limit),
        "about": _about(point.task, scored),
        "value": scored.value,
        "flops": counted,
        "metrics": {name: leaf.metrics for name, leaf in scored.leaves.items()},
        "requests": list(_lines(point, scored, found)),
    }


@dataclass
class Asking:
    """A model and tasks, loaded when the first point needs them: that imports lmms-eval."""

    sweep: Sweep
    runs: Sequence[Pipeline]
    folder: Path
    device: str | None
    model: Any = field(default=None, init=False)
    harness: Any = field(default=None, init=False)

    def ready(self) -> VtokenModel:
        """The dense model."""
        if self.model is None:
            from vtoken.evals.lmms.harness import Harness
            from vtoken.evals.lmms.model import VtokenModel

            folders = [folder.resolve() for folder in self.sweep.include]
            self.harness = Harness(expand(self.sweep.tasks), folders, self.sweep.prompts)
            self.model = VtokenModel(self.sweep.model, device=self.device, **self.sweep.model_args())
            for pipeline in self.runs:
                self.model.use(pipeline)
        return self.model

    def ask(self, point: Point) -> Answered:
        return ask(self.ready(), self.harness, point, self.sweep.limit, self.folder)


def conditions(model: VtokenModel, limit: int | None) -> dict[str, Any]:
    """What a reader needs to run it again."""
    about = {key: value for key, value in model.about().items() if key not in ("pretrained", "pipeline")}
    return {
        **machine(model.generator.model),
        **about,
        "weights": getattr(model.generator.model.config, "_commit_hash", None),
        "lmms_eval": version("lmms-eval"),  # lmms-eval calls itself "unknown" when pip installed it.
        "datasets": version("datasets"),
        "commit": commit(),
        "limit": limit,
        "generation": "as the tasks say; seeds 0, 1234 and 1234 (Python, numpy, torch), set for every task",
    }


def _about(task: str, scored: Scored) -> dict[str, Any]:
    return {
        "metric": scored.metric,
        "scale": KNOWN[task].scale if task in KNOWN else None,
        "higher_is_better": all(
            leaf.higher_is_better.get(scored.metric or "", True) for leaf in scored.leaves.values()
        ),
        "docs": sum(len(leaf.samples) for leaf in scored.leaves.values()),
        "hash": scored.hash,
        "leaves": {name: leaf.options() for name, leaf in scored.leaves.items()},
    }


def _lines(point: Point, scored: Scored, found: Mapping[tuple[str, int], Request]) -> Iterator[dict[str, Any]]:
    for name, leaf in scored.leaves.items():
        for sample in leaf.samples:
            line = {
                "pipeline": point.pipeline.name,
                **found[name, int(sample["doc_id"])].to_dict(),
                "question": sample["arguments"][0],
                "target": sample["target"],
                "score": document_score(point.task, sample.get(scored.metric or "")),
                "scores": {metric: sample[metric] for metric in sorted(set(leaf.higher_is_better) & set(sample))},
                "same_as_dense": True,  # until it is compared with dense
                "doc_hash": sample["doc_hash"],
            }
            yield json.loads(json.dumps(line, default=str))


def file_of(folder: Path, key: str) -> Path:
    return folder / "points" / f"{key}.json"


def save(folder: Path, key: str, what: Any) -> None:
    """Writes plain data under a key, whole or not at all."""
    whole.write(file_of(folder, key), json.dumps(what) + "\n")


def load(folder: Path, key: str, fits: Callable[[Any], bool]) -> Any:
    """What `save` wrote under a key; None if nothing is there or, with a warning, nothing that `fits`."""
    return whole.kept(file_of(folder, key), fits)


def is_point(found: Any) -> bool:
    """Whether it is what `ask` gave, as far as results are put together of it. Like the two below it may raise what
    `whole.kept` catches."""
    numbers = {each.name for each in fields(Cost)} - {"stages"}
    each = [n for line in found["requests"] for n in (*line["stages"].values(), *(line[name] for name in numbers))]
    return (
        all(type(n) in (int, float) for n in each)
        and all(isinstance(line["answer"], str) and {"task", "doc", "score"} <= set(line) for line in found["requests"])
        and ABOUT <= set(found["about"])
        and all(isinstance(found[key], dict) for key in ("conditions", "flops", "metrics"))
        and (found["value"] is None or type(found["value"]) in (int, float))
        and len(found["requests"]) > 0
    )


def is_cases(found: Any) -> bool:
    """Whether it is what `regressions.draw` gave, with pictures in their folder."""
    names = [name for case in found for name in case["panels"].values() if name is not None]
    known = isinstance(found, list) and all({"task", "doc"} <= set(case) for case in found)
    return known and all(re.fullmatch(r"cases/[0-9-]+\.jpg", name) for name in names)


def is_speed(found: Any) -> bool:
    """Whether it is what `bench` gave, as far as a report reads it."""
    rows = found["rows"]
    return all("name" in row and "to_dense" in row and row["milliseconds"]["ttft"]["median"] for row in rows)
