"""Points of a sweep, asked by one process, several, a Ray cluster or all processes of torchrun; then, apart, the speed
of all pipelines."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.lmms.harness import everyone, ranks
from vtoken.evals.lmms.prepare import prepare_ray, quiet
from vtoken.evals.quality import cluster, regressions
from vtoken.evals.quality.options import Sweep
from vtoken.evals.quality.points import Answered, Asking, Point, is_cases, is_point, is_speed, load, points, save
from vtoken.evals.quality.results import Results, assemble
from vtoken.evals.quality.run import with_dense
from vtoken.evals.shared.bars import mute, say
from vtoken.evals.shared.identity import commit, digest
from vtoken.evals.speed.latency import bench


def run(
    sweep: Sweep,
    folder: Path,
    workers: int | None = None,
    command: str = "",
    ray: str | None = None,
) -> Results | None:
    """Asks what is not in the folder yet and writes DIR/results.json, DIR/requests/, DIR/cases/ and DIR/points/.

    Args:
        workers: processes, each with a model of its own; they take the GPUs in turn. None is 1, or with Ray what
            `cluster.ask_all` says.
        ray: address of a Ray cluster, "" for the one that Ray finds or starts; None: no Ray.

    Returns:
        The results; None in every process of torchrun but the first.

    Raises:
        ConfigError: workers that cannot be had, two pipelines of one name.
        VtokenError: Ray is missing or its cluster cannot be reached; workers that died.
        UnsupportedError: a stage that the model cannot serve, before anything is asked.
        Whatever model and scorers raise: points that were finished before stay in the folder, and are not asked again.
    """
    rank, world = ranks()
    if world > 1 and (ray is not None or (workers or 1) > 1):
        raise ConfigError(f"torchrun starts the processes already; leave --{'workers' if ray is None else 'ray'} out")
    if ray is not None:
        prepare_ray()
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    runs = with_dense(sweep.all_pipelines())
    made_by = commit()
    todo = points(sweep, runs, made_by)
    folder = folder.resolve()
    if rank == 0:
        (folder / "points").mkdir(parents=True, exist_ok=True)
    asking = Asking(sweep, runs, folder, sweep.device)
    # The first process says what is missing: the others may not see its folder.
    missing = everyone([point for point in todo if rank == 0 and load(folder, point.key, is_point) is None])[0]
    done = len(todo) - len(missing)

    def tell(what: str) -> None:
        say(f"{done} of {len(todo)} points, {what}", done / len(todo))

    def keep(point: Point, found: Answered) -> None:
        nonlocal done
        done += 1
        if rank == 0:
            save(folder, point.key, found)
            tell(f"{point.pipeline.name}: {point.task}")

    tell("loading the model" if missing else "all points are there")
    try:
        if ray is not None and missing:
            cluster.ask_all(asking, todo, missing, made_by, keep, ray, workers)
        elif workers is not None and workers > 1 and missing:
            _in_parallel(asking, missing, workers, keep)
        else:
            for point in missing:
                keep(point, asking.ask(point))
    finally:
        if rank == 0:
            kept = {point: load(folder, point.key, is_point) for point in todo}
            results = assemble(folder, sweep.model, command, runs, kept)
    if rank > 0:
        return None
    assert results is not None  # the first dense point is there, or something was raised
    keys = [point.key for point in todo]
    if sweep.speed is not None:
        tell("speed")
        results.speed = _speed(asking, keys)
    tell("pictures of what was lost")
    results.cases = _cases(asking, keys)
    results.save()
    return results


def _cases(asking: Asking, keys: Sequence[str]) -> list[dict[str, Any]]:
    """Pictures of what was lost, drawn once."""
    folder, key = asking.folder, "cases-" + digest(keys)
    found: list[dict[str, Any]] | None = load(folder, key, is_cases)
    if found is not None and all(
        (folder / file).is_file() for case in found for file in case["panels"].values() if file
    ):
        return found
    found, chosen = [], regressions.lost(folder)
    if chosen:
        model = asking.ready()
        asking.harness.introduce(model, chosen)
        found = regressions.draw(model, asking.runs[:-1], chosen, folder)
    save(folder, key, found)
    return found


def _speed(asking: Asking, keys: Sequence[str]) -> Any:
    assert asking.sweep.speed is not None
    options = asking.sweep.speed.model_dump()
    # Threads do not change answers, but they do change times.
    key = "speed-" + digest(keys, options, torch.get_num_threads())
    found = load(asking.folder, key, is_speed)
    if found is None:
        found = bench(asking.ready().generator.model, asking.runs[1:-1], batch=1, **options).to_dict()
        save(asking.folder, key, found)
    return found


def _in_parallel(
    asking: Asking, missing: Sequence[Point], workers: int, keep: Callable[[Point, Answered], None]
) -> None:
    """Every process takes the next point as soon as it is free; the first one that fails ends them all."""
    context = multiprocessing.get_context("spawn")
    places = context.Queue()
    for k in range(workers):
        places.put(k)
    threads = max(1, torch.get_num_threads() // workers)
    pool = ProcessPoolExecutor(min(workers, len(missing)), context, _enter, (places, asking, threads))
    waiting = {pool.submit(_work, point): point for point in missing}
    try:
        for future in as_completed(waiting):
            keep(waiting[future], future.result())
    except BrokenProcessPool as error:
        raise VtokenError(
            "a worker process died, perhaps for lack of memory; what was finished stays: run the same command again, "
            "with fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: Asking | None = None  # of a worker process


def _enter(places: Any, asking: Asking, threads: int) -> None:
    global _own
    quiet()
    mute()
    torch.set_num_threads(threads)
    place, count = places.get(), torch.cuda.device_count()
    if asking.device in (None, "cuda") and count:
        asking.device = f"cuda:{place % count}"
    _own = asking


def _work(point: Point) -> Answered:
    assert _own is not None
    return _own.ask(point)
