"""Points over a Ray cluster: who takes which, what happens when an actor dies, and what is refused. Real actors are in
test_sweep."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ray_stand_in import Ray

pytest.importorskip("lmms_eval")

from vtoken import config
from vtoken.cli import main
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.lmms import prepare
from vtoken.evals.quality import cluster, points, sweep
from vtoken.evals.quality.options import Sweep
from vtoken.evals.quality.points import Asking, Point
from vtoken.evals.shared import identity

SWEEP = Sweep(model="tiny-llava", tasks=("a", "b"))
POINTS = [Point(k, config.load(f"random:{k + 1}"), task, f"{k}{task}") for k in range(3) for task in ("a", "b")]


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    """Stands in for Ray; actors answer with a point's key and load nothing."""
    found = Ray()
    monkeypatch.setitem(sys.modules, "ray", found)
    monkeypatch.setattr(cluster.Worker, "ready", lambda self: None)
    monkeypatch.setattr(cluster.Worker, "ask", lambda self, point: point.key)
    monkeypatch.setattr(cluster.torch, "get_num_threads", lambda: 4)
    return found


def ask(given: Sweep = SWEEP, address: str = "", workers: int | None = 2, missing: Any = POINTS) -> dict[str, str]:
    kept: dict[str, str] = {}

    def keep(point: Point, found: str) -> None:
        assert point.key not in kept
        kept[point.key] = found

    cluster.ask_all(Asking(given, [], Path("out"), given.device), POINTS, missing, None, keep, address, workers)
    return kept


EVERY = {point.key: point.key for point in POINTS}


def test_every_point_is_asked_once(ray: Ray) -> None:
    assert ask() == EVERY
    assert [name for _, name, *_ in ray.calls].count("ask") == len(POINTS)
    assert len(ray.hired) == 2 and ray.killed == {0, 1} and not ray.running
    assert ray.asked_for == {"num_cpus": 2, "num_gpus": 0}


def test_an_actor_without_a_place_holds_no_point(ray: Ray) -> None:
    ray.late = {1}
    assert ask() == EVERY and {number for number, name, *_ in ray.calls if name == "ask"} == {0}


def test_no_more_actors_than_points(ray: Ray) -> None:
    assert ask(workers=4, missing=POINTS[:1]) == {"0a": "0a"} and len(ray.hired) == 1


def test_a_point_whose_actor_dies_is_asked_again(ray: Ray, capsys: pytest.CaptureFixture[str]) -> None:
    died: list[str] = []

    def deadly(number: int, name: str, point: Any = None) -> bool:
        if point is None or point.key in died or point.key not in ("0b", "2b"):
            return False
        died.append(point.key)
        return True

    ray.deadly = deadly
    assert ask() == EVERY and sorted(died) == ["0b", "2b"]
    printed = capsys.readouterr().err.splitlines()
    assert "an actor died while random:1 answered b; another one takes over" in printed and len(printed) == 2
    assert len(ray.killed) == len(ray.hired) > 2


def test_a_point_that_two_actors_die_of_is_reported(ray: Ray) -> None:
    ray.deadly = lambda number, name, point=None: point is not None and point.key == "1a"
    with pytest.raises(VtokenError, match="two actors died while random:2 answered a, perhaps for lack of memory"):
        ask()
    assert len(ray.killed) == len(ray.hired) and not ray.running
    ray.deadly = lambda number, name, point=None: name == "ready"
    with pytest.raises(VtokenError, match="two actors died while the model was loaded"):
        ask()


def test_an_error_is_raised_as_it_was(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, point: Point) -> None:
        raise KeyError(point.key)

    monkeypatch.setattr(cluster.Worker, "ask", fails)
    with pytest.raises(KeyError) as caught:
        ask()
    assert caught.type is KeyError and not ray.running and ray.killed == {0, 1}


def test_a_connection_of_the_caller_stays(ray: Ray) -> None:
    ray.running = True
    ask()
    assert ray.running


def test_room(ray: Ray) -> None:
    with pytest.raises(ConfigError, match="5 actors of 1 CPU each: the Ray cluster has room for 4"):
        ask(workers=5)
    with pytest.raises(ConfigError, match="no machine of the Ray cluster has a GPU"):
        ask(SWEEP.model_copy(update={"device": "cuda"}))
    with pytest.raises(ConfigError, match="device 'cuda:1': Ray hands out the GPUs"):
        ask(SWEEP.model_copy(update={"device": "cuda:1"}))
    with pytest.raises(VtokenError, match=r"cannot reach a Ray cluster at 'nowhere': no such host; `ray start --head`"):
        ask(address="nowhere")
    ask(workers=None)
    assert len(ray.hired) == 1  # one for the only machine
    machines = [{"CPU": 8.0, "GPU": 2.0}, {"CPU": 2.0}, {"CPU": 8.0, "GPU": 1.0}]
    assert cluster._shares(machines, None, None) == (3, 1, True)
    assert cluster._shares(machines, "cpu", None) == (3, 1, False)
    assert cluster._shares(machines[1:2], None, None) == (1, 2, False)  # no more threads than it has CPUs
    with pytest.raises(ConfigError, match="4 actors of 1 CPU and a GPU each: the Ray cluster has room for 3"):
        cluster._shares(machines, "cuda", 4)


def test_another_machine_must_hold_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.chdir(tmp_path)
    given = SWEEP.model_copy(update={"tasks": ("smoke",), "device": "cpu"})
    runs = sweep.with_dense([config.load("random:4")])
    keys = {point.key for point in points.points(given, runs, "abc")}
    for others, code in (({"other"}, identity.code()), (keys, "other")):
        asking = Asking(given, runs, tmp_path, given.device)
        with pytest.raises(VtokenError, match="has another vtoken, torch, transformers, model or task files"):
            cluster.Worker(asking, others, "abc", code, tmp_path, 1).ready()
        assert asking.model is None
    monkeypatch.setattr(Asking, "ready", lambda self: None)
    worker = cluster.Worker(Asking(given, runs, tmp_path, given.device), keys, "abc", identity.code(), tmp_path, 1)
    worker.ready()
    assert worker.asking.folder != tmp_path  # which holds no points: it is not the caller's


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(prepare, "find_spec", lambda name: None)
    (tmp_path / "sweep.yaml").write_text("model: tiny-llava\ntasks: [smoke]\n")
    words = ["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out"), "--ray"]
    assert main(words) == 2
    assert "needs Ray: pip install ray" in capsys.readouterr().err
    with pytest.raises(VtokenError, match="needs Ray"):
        sweep.run(SWEEP, tmp_path / "out", ray="")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave --ray out"):
        sweep.run(SWEEP, tmp_path / "out", ray="")
    assert not (tmp_path / "out").exists()
