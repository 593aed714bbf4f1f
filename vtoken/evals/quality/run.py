"""Pipelines x tasks with the model loaded once, dense first and last. What it writes is described in `results`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vtoken.config import Pipeline
from vtoken.errors import ConfigError
from vtoken.evals.lmms.harness import Harness, ranks
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.quality import regressions
from vtoken.evals.quality.points import Answered, Point, ask
from vtoken.evals.quality.results import Results, assemble
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.dense import DENSE, is_stock
from vtoken.evals.shared.whole import check_out


def with_dense(pipelines: Sequence[Pipeline]) -> list[Pipeline]:
    """Dense, the pipelines, dense. Pipelines that leave the model as it is are left out.

    Raises:
        ConfigError: two pipelines of one name, or one called as dense is.
    """
    named: dict[str, Pipeline] = {}
    for pipeline in pipelines:
        if is_stock(pipeline):
            continue
        if named.setdefault(pipeline.name, pipeline) != pipeline:
            raise ConfigError(f"two pipelines are called {pipeline.name!r}; rename one file")
    if DENSE.name in named:
        raise ConfigError("a pipeline cannot be called 'dense', which is the stock model; rename its file")
    return [DENSE, *named.values(), DENSE] if named else [DENSE]


def planned(pipelines: Sequence[Pipeline], folder: Path) -> list[Pipeline]:
    """What is run; refuses, without a model, what `evaluate` lists as a ConfigError."""
    if ranks()[1] > 1:
        raise ConfigError("vtoken eval is one process; under torchrun or accelerate launch take vtoken sweep")
    check_out(folder)
    if (folder / "results.json").exists():
        raise ConfigError(f"{folder} holds results already; give another folder with --out")
    return with_dense(pipelines)


def evaluate(
    model: VtokenModel,
    pipelines: Sequence[Pipeline],
    harness: Harness,
    folder: Path,
    limit: int | None = None,
    command: str = "",
) -> Results:
    """Asks every task under every pipeline and writes DIR/results.json and DIR/requests/.

    Args:
        limit: first documents of every task (of a group: of every part) only; None is all.

    Raises:
        ConfigError: several processes, a folder that holds results already, two pipelines of one name.
        UnsupportedError: a stage that the model cannot serve, before anything is asked.
        VtokenError: a task whose scorer fails.
        Whatever the model raises: what was finished before stays in the folder, with `complete` false.
    """
    runs = planned(pipelines, folder)
    for pipeline in runs:
        model.use(pipeline)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    kept: dict[Point, Answered | None] = {Point(k, p, task): None for k, p in enumerate(runs) for task in harness.tasks}
    run = 0
    try:
        for k, point in enumerate(kept):
            if point.run > run:  # A process that is killed leaves whole runs.
                run = point.run
                assemble(folder, model.pretrained, command, runs, kept)
            say(f"{point.pipeline.name}: {point.task}", k / len(kept))
            kept[point] = ask(model, harness, point, limit, folder)
    finally:
        results = assemble(folder, model.pretrained, command, runs, kept)
    assert results is not None  # the first dense point is there, or something was raised
    say("pictures of what was lost", 1)
    results.cases = regressions.draw(model, runs[:-1] or runs, regressions.lost(folder), folder)
    results.save()
    return results
