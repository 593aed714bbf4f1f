"""Points of a sweep on a Ray cluster, asked by actors that load the model once and take one point after the other."""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.lmms.prepare import prepare
from vtoken.evals.quality.points import Asking, Point, points
from vtoken.evals.shared.identity import code


@dataclass
class Worker:
    """A Ray actor. It imports lmms-eval and loads the model in `ready` and not in its constructor, whose errors Ray
    does not bring to the caller.

    Attributes:
        asking: the caller's, with nothing loaded. Where this machine does not see the folder of the results, what
            scorers write stays in a temporary one.
        keys: of all points as the caller names them, with `commit` as its commit.
        code: of the caller's vtoken, as `identity.code` says it.
        place: the caller's working directory, which relative paths of the sweep start from.
    """

    asking: Asking
    keys: set[str]
    commit: str | None
    code: str
    place: Path
    threads: int

    def ready(self) -> None:
        """Loads everything.

        Raises:
            VtokenError: what is installed here, or a file, is not as on the caller's machine.
        """
        os.environ["TQDM_DISABLE"] = "1"
        torch.set_num_threads(self.threads)
        with suppress(OSError):
            os.chdir(self.place)
        prepare("vtoken sweep --ray")
        same = {point.key for point in points(self.asking.sweep, self.asking.runs, self.commit)} == self.keys
        if not same or code() != self.code:
            raise VtokenError(
                f"{socket.gethostname()} has another vtoken, torch, transformers, model or task files than the machine "
                "that started the sweep, so its answers would not be the same; install the same and put the files on "
                "a shared disk (of files above 64 MB the time of change counts: copy with rsync -a)"
            )
        if not (self.asking.folder / "points").is_dir():
            self.asking.folder = Path(tempfile.mkdtemp(prefix="vtoken-"))
        self.asking.ready()

    def ask(self, point: Point) -> Any:
        return self.asking.ask(point)


def ask_all(
    asking: Asking,
    todo: Sequence[Point],
    missing: Sequence[Point],
    commit: str | None,
    keep: Callable[[Point, Any], None],
    address: str,
    workers: int | None,
) -> None:
    """Asks the missing points; an actor that dies is replaced and its point asked again, once.

    Args:
        todo: all points of the sweep, named with `commit`.
        keep: called with every point and what was found, here, in any order.
        address: of a running cluster; "" is the one that Ray finds (RAY_ADDRESS, this machine's), else one of this
            machine alone.
        workers: actors; None is one for every GPU of the cluster, without any one for every machine.

    Raises:
        VtokenError: the cluster cannot be reached, or two actors died of one point.
        ConfigError: more actors than the cluster has room for, or a device that Ray does not hand out.
        Whatever an actor raises: it ends all.
    """
    import ray

    if asking.device not in (None, "cpu", "cuda"):
        raise ConfigError(f"device {asking.device!r}: Ray hands out the GPUs; write cuda or cpu, or leave the key out")
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, address)
    actors: list[Any] = []
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        count, threads, gpu = _shares(machines, asking.device, workers)
        count = min(count, len(missing))
        hired = ray.remote(num_cpus=threads, num_gpus=int(gpu))(Worker)
        about = (asking, {point.key for point in todo}, commit, code(), Path.cwd(), threads)
        waiting, died = deque(missing), set()
        busy: dict[Any, tuple[Any, Point | None]] = {}

        def hire() -> None:
            actors.append(hired.remote(*about))
            busy[actors[-1].ready.remote()] = actors[-1], None

        for _ in range(count):
            hire()
        # An actor that never got a place keeps nobody waiting.
        while waiting or any(point is not None for _, point in busy.values()):
            ended = ray.wait(list(busy), num_returns=1)[0][0]
            actor, point = busy.pop(ended)
            try:
                found = ray.get(ended)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from error
            except ray.exceptions.RayError as error:  # Actor, machine or memory are gone.
                what = "the model was loaded" if point is None else f"{point.pipeline.name} answered {point.task}"
                if what in died:
                    raise VtokenError(
                        f"two actors died while {what}, perhaps for lack of memory; what was finished stays: run the "
                        "same command again, with fewer workers"
                    ) from error
                died.add(what)
                print(f"an actor died while {what}; another one takes over", file=sys.stderr)
                waiting.extendleft([] if point is None else [point])
                if waiting:
                    hire()
                continue
            if point is not None:
                keep(point, found)
            if waiting:
                point = waiting.popleft()
                busy[actor.ask.remote(point)] = actor, point
            else:
                ray.kill(actor)
    finally:
        for actor in actors:
            ray.kill(actor)
        if ours:
            ray.shutdown()


def _connect(ray: Any, address: str) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # A sweep does not tell others that it ran.
    try:
        # What actors print would go to standard output, where --json is; what they raise is raised here.
        ray.init(address or None, log_to_driver=False, logging_level="warning")
    except (ConnectionError, OSError, RuntimeError, ValueError) as error:
        raise VtokenError(
            f"cannot reach a Ray cluster at {address or 'this machine'!r}: {error}; `ray start --head` starts one and "
            "prints its address, --ray without an address uses this machine"
        ) from error


def _shares(machines: Sequence[dict[str, float]], device: str | None, workers: int | None) -> tuple[int, int, bool]:
    """Actors, CPU threads of each, and whether each takes a GPU.

    Args:
        machines: "CPU" and "GPU" of each, as Ray counts them.
    """
    gpus = sum(int(machine.get("GPU", 0)) for machine in machines)
    if device == "cuda" and not gpus:
        raise ConfigError("device: cuda, but no machine of the Ray cluster has a GPU")
    gpu = bool(gpus) and device != "cpu"
    count = workers or (gpus if gpu else len(machines))
    largest = max(int(machine.get("CPU", 0)) for machine in machines)
    threads = max(1, min(torch.get_num_threads() // count, largest))
    room = sum(
        min(int(machine.get("CPU", 0)) // threads, int(machine.get("GPU", 0)) if gpu else count) for machine in machines
    )
    if count > room:
        each = f"{threads} CPU{' and a GPU' if gpu else ''} each"
        raise ConfigError(
            f"{count} actors of {each}: the Ray cluster has room for {room}; take fewer --workers or --threads"
        )
    return count, threads, gpu
