"""Sweeps: one process, several, torchrun and a killed one come to the same; what is kept is not asked again."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageStat
from tiny_processors import save

pytest.importorskip("lmms_eval")

import lmms_tasks

from vtoken import registry
from vtoken.cli import main
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals import reference
from vtoken.evals.lmms.suites import KNOWN
from vtoken.evals.quality import points, sweep
from vtoken.evals.quality.options import Sweep
from vtoken.evals.quality.printed import cells
from vtoken.evals.quality.results import Results
from vtoken.evals.shared import bars
from vtoken.evals.shared.options import SpeedOptions
from vtoken.evals.shared.yaml_options import read
from vtoken.session import wrapped

ROOT = Path(__file__).parents[3]
# What nobody can repeat, and how many documents shared a batch, which is another number where they are shared out.
PASSING = ("preprocess_s", "ttft_s", "decode_s", "ttft_to_dense", "batch", "stages")
RUNS = 5  # dense, two methods at one budget, one pipeline, dense


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two tasks, and a sweep.yaml about them."""
    folder = tmp_path_factory.mktemp("sweep")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(folder / "cache")
    save("llava", folder / "model")
    fatal = "[{metric: hit, aggregation: !function utils.third_time_fatal, higher_is_better: true}]"
    lmms_tasks.write(folder / "tasks", "odd", 5)
    lmms_tasks.write(folder / "tasks", "fatal", 3, metric_list=fatal)
    text = f"""\
model: {folder / "model"}
methods: [random, uniform]
budgets: [5]
pipelines: ["fastervlm:3"]
tasks: [odd, fatal]
include: [{folder / "tasks"}]
device: cpu
batch_size: 2
speed: {{repeats: 2, warmup: 0, new_tokens: 2}}
"""
    (folder / "sweep.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def given(place: Path) -> Sweep:
    return read(Sweep, place / "sweep.yaml")


@pytest.fixture(scope="module")
def whole(place: Path, given: Sweep) -> Results:
    """The sweep by one process, undisturbed."""
    found = sweep.run(given, place / "whole")
    assert found is not None
    return found


def program(*words: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-m", *map(str, words)], env=env, cwd=ROOT, capture_output=True, text=True)


def timeless(folder: Path) -> tuple[Any, Any]:
    """Everything a sweep wrote about answers, times taken out."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["runs"]:
        row["tasks"] = {t: {k: v for k, v in about.items() if k not in PASSING} for t, about in row["tasks"].items()}
    lines = [
        {key: value for key, value in json.loads(line).items() if key not in PASSING}
        for row in results["runs"]
        for line in (folder / row["requests"]).read_text().splitlines()
    ]
    return [results[key] for key in ("complete", "tasks", "runs")], lines


def test_a_whole_sweep(whole: Results) -> None:
    assert [row["name"] for row in whole.runs] == ["dense", "fastervlm:3", "random:5", "uniform:5", "dense"]
    assert whole.complete and whole.drift is not None and whole.drift["answers_changed"] == 0
    kept = {row["name"]: [row["tasks"][task]["visual_tokens_entry"] for task in ("odd", "fatal")] for row in whole.runs}
    assert kept["random:5"] == kept["uniform:5"] == [5, 5] and kept["fastervlm:3"] == [3, 3]
    _, lines = timeless(whole.folder)
    assert len(lines) == RUNS * (5 + 3) and {line["pipeline"] for line in lines} == set(kept)
    for row in whole.runs:
        own = [line["same_as_dense"] for line in lines if line["pipeline"] == row["name"] and line["task"] == "odd"]
        assert row["tasks"]["odd"]["same_as_dense"] == pytest.approx(sum(own) / len(own))
    assert whole.speed is not None and [row["name"] for row in whole.speed["rows"]] == list(kept)


def test_the_table_says_what_the_file_does(whole: Results) -> None:
    head, *rows = cells(whole)
    assert all(len(row) == len(head) for row in rows) and [row[0] for row in rows] == [r["name"] for r in whole.runs]
    left = ["16", "3", "5", "5", "16"]
    assert [row[head.index("over layers")] for row in rows] == left
    assert [row[head.index("visual tokens")] for row in rows] == [f"{count} of 16" for count in left]
    assert rows[0][head.index("answers as dense")] == "100.0 %" and rows[0][head.index("TTFT / dense")] == ""
    assert "TTFT ms" not in cells(replace(whole, speed=None))[0]


def test_a_sweep_shows_what_was_lost(
    place: Path, given: Sweep, whole: Results, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a folder where everything was asked already: two documents are drawn, once, and again if a picture is
    missing."""
    chosen = [
        {"task": "fatal", "doc": 2, "shown": ["random:5"]},
        {"task": "odd", "doc": 4, "shown": ["fastervlm:3", "random:5"]},
    ]
    lines = []

    def worst(dense: Any, pruned: Any, falls: Any) -> Any:
        lines.append((len(dense), {name: len(own) for name, own in pruned.items()}, falls))
        return chosen

    monkeypatch.setattr(sweep.regressions, "worst", worst)
    out = shutil.copytree(whole.folder, place / "cases")
    for file in (out / "points").glob("cases-*.json"):
        file.unlink()
    found = sweep.run(given, out)
    assert found is not None and lines == [
        (8, dict.fromkeys(("fastervlm:3", "random:5", "uniform:5"), 8), {"odd": 1.0, "fatal": 1.0})
    ]
    assert [(case["task"], case["doc"], list(case["panels"])) for case in found.cases] == [
        ("fatal", 2, ["dense", "random:5"]),
        ("odd", 4, ["dense", "fastervlm:3", "random:5"]),
    ]
    with Image.open(out / found.cases[1]["panels"]["dense"]) as picture:
        assert all(abs(a - b) < 6 for a, b in zip(ImageStat.Stat(picture).mean, (80, 99, 9), strict=True))
    before = {file: file.stat().st_mtime_ns for file in (out / "cases").iterdir()}
    assert len(before) == 5
    sweep.run(given, out)
    assert {file: file.stat().st_mtime_ns for file in before} == before and len(lines) == 1
    next(iter(before)).unlink()
    sweep.run(given, out)
    assert all(file.exists() for file in before) and len(lines) == 2


def test_bars_stay_on_terminals(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    """Neither lmms-eval's, nor those of loading: a line now and then says which point and question it is at."""
    monkeypatch.setattr(bars, "EVERY", 0)
    assert main(["sweep", str(place / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 0
    err = capfd.readouterr().err
    assert "it/s" not in err and "\r" not in err
    printed = [line.split("%  ")[1] for line in err.splitlines() if "%  " in line]
    assert {"0 of 10 points, loading the model", "fastervlm:3: 0 of 3", "10 of 10 points, speed"} <= {*printed}


def test_nothing_is_asked_twice(place: Path, given: Sweep, whole: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("asked again")

    before = timeless(whole.folder)
    monkeypatch.setattr(points, "ask", never)
    monkeypatch.setattr(sweep, "bench", never)
    sweep.run(given, whole.folder)
    assert timeless(whole.folder) == before


def test_torn_and_foreign_files_are_made_anew(place: Path, given: Sweep, whole: Results, tmp_path: Path) -> None:
    """A point, the cases and a picture of them, cut short; a point of something else."""
    shutil.copytree(place / "whole", tmp_path / "torn")
    files = sorted(
        (tmp_path / "torn" / "points").glob("[0-9a-f]*.json"), key=lambda file: not file.name.startswith("cases-")
    )
    files = [file for file in files if not file.name.startswith("speed-")]
    torn = files[:2]
    for file in torn:
        file.write_bytes(file.read_bytes()[:-20])
    files[2].write_text('{"error": "quota"}')
    with pytest.warns(UserWarning, match="taken as missing") as warned:
        sweep.run(given, tmp_path / "torn")
    assert {str(file) for file in files[:3]} == {
        str(w.message).partition(" ")[0] for w in warned if "taken as" in str(w.message)
    }
    assert timeless(tmp_path / "torn") == timeless(place / "whole")
    assert not list((tmp_path / "torn").rglob("*.part"))


def test_what_decides_the_numbers_names_the_points(given: Sweep, whole: Results) -> None:
    def keys(sweep_: Sweep, commit: str | None = "abc") -> set[str]:
        return {point.key for point in sweep.points(sweep_, sweep.with_dense(sweep_.all_pipelines()), commit)}

    own = keys(given)
    assert len(own) == RUNS * 2
    for change in ({"limit": 2}, {"dtype": "bfloat16"}, {"max_new_tokens": 4}, {"batch_size": 1}, {"include": ()}):
        assert not own & keys(given.model_copy(update=change)), change
    assert not own & keys(given, "def")
    more = keys(given.model_copy(update={"budgets": (5, 4)}))
    assert own < more and len(more) == len(own) + 2 * 2
    assert keys(given.model_copy(update={"speed": None})) == own


def test_killed_and_run_again(place: Path, given: Sweep, whole: Results) -> None:
    out = place / "killed"
    words = ("vtoken", "sweep", place / "sweep.yaml", "--out", out)
    killed = program(*words, VTOKEN_TEST_CALLS=str(place / "calls"))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    files = {file: file.stat().st_mtime_ns for file in (out / "points").glob("*.json")}
    assert len(files) == 5  # dense and fastervlm on both tasks, random on the first; the sixth was fatal
    assert not (out / "results.json").exists()
    sweep.run(given, out)
    assert timeless(out) == timeless(whole.folder)
    assert {file: file.stat().st_mtime_ns for file in files} == files


def test_workers_come_to_the_same(place: Path, whole: Results) -> None:
    out = place / "workers"
    done = program("vtoken", "sweep", place / "sweep.yaml", "--out", out, "--workers", 2)
    assert done.returncode == 0, done.stderr
    assert timeless(out) == timeless(whole.folder)
    assert "| random:5 |" in (out / "table.md").read_text()
    if find_spec("jinja2") and find_spec("matplotlib"):
        assert "uniform:5" in (out / "report.html").read_text()


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed: pip install ray")
def test_ray_comes_to_the_same_though_an_actor_is_killed(place: Path, whole: Results) -> None:
    out = place / "ray"
    words = ("vtoken", "sweep", place / "sweep.yaml", "--out", out, "--ray", "--workers", 2)
    done = program(*words, VTOKEN_TEST_CALLS=str(place / "ray-calls"), RAY_ADDRESS="local")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("an actor died while") == 1 and "answered fatal; another one takes over" in done.stderr
    assert (place / "ray-calls").read_text() == "x" * (RUNS + 1)
    assert timeless(out) == timeless(whole.folder)


def test_torchrun_comes_to_the_same(place: Path, whole: Results) -> None:
    out = place / "torchrun"
    run = ("torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m")
    done = program(*run, "vtoken", "sweep", place / "sweep.yaml", "--out", out)
    assert done.returncode == 0, done.stderr
    assert timeless(out) == timeless(whole.folder)


def test_an_error_leaves_what_was_finished(place: Path, given: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    real = points.ask

    def failing(model: Any, harness: Any, point: Any, *rest: Any) -> Any:
        if point.pipeline.name == "random:5":
            raise RuntimeError("out of memory")
        return real(model, harness, point, *rest)

    monkeypatch.setattr(points, "ask", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        sweep.run(given, place / "failed")
    found = json.loads((place / "failed" / "results.json").read_text())
    assert not found["complete"] and [row["name"] for row in found["runs"]] == ["dense", "fastervlm:3"]


def test_other_documents_are_refused(place: Path, given: Sweep, whole: Results) -> None:
    todo = sweep.points(given, sweep.with_dense(given.all_pipelines()), sweep.commit())
    victim = next(point for point in todo if point.run == 1)
    kept = points.load(whole.folder, victim.key, points.is_point)
    points.save(whole.folder, victim.key, {**kept, "about": {**kept["about"], "hash": "other"}})
    try:
        with pytest.raises(VtokenError, match="other documents"):
            sweep.run(given, whole.folder)
    finally:
        points.save(whole.folder, victim.key, kept)


def test_workers_that_cannot_be_had(given: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="leave --workers out"):
        sweep.run(given, tmp_path, workers=2)


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("sweep-*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_run_on_their_model(file: Path) -> None:
    asked = read(Sweep, file)
    assert file.stem == f"sweep-{asked.model}" and set(asked.tasks) <= set(KNOWN)
    model, _ = reference.load(asked.model)
    for pipeline in asked.all_pipelines():
        with wrapped(model, pipeline):
            pass


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks").glob("sweep-*.yaml")), ids=lambda file: file.stem)
def test_shipped_sweeps_leave_out_nothing_without_a_word(file: Path) -> None:
    """A new stage is asked, or the head of the file says why not."""
    head = set(re.findall(r"\w+", "".join(line for line in file.read_text().splitlines() if line.startswith("#"))))
    asked = {stage.name for pipeline in read(Sweep, file).all_pipelines() for stage in pipeline.stages}
    assert not set(registry.stages()) - asked - head


WRONG = [
    ("modl: tiny-llava\ntasks: [a]\n", "sweep.yaml:1: unknown key 'modl', did you mean 'model'"),
    ("tasks: [a]\n", "key 'model' is missing: shipped model"),
    ("model: tiny-llava\ntasks: [a]\nlimit: '8'\n", "sweep.yaml:3: limit: Input should be a valid integer, not '8'"),
    ("model: tiny-llava\ntasks: [a]\nmethods: [random]\n", "methods and budgets go together"),
    ("model: m\ntasks: [a]\nspeed:\n  repeat: 3\n", "sweep.yaml:4: unknown key 'repeat', did you mean 'repeats'"),
    ("[a]\n", "write keys and values"),
]


@pytest.mark.parametrize(("text", "message"), WRONG)
def test_a_file_that_cannot_be_used(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text(text)
    assert main(["sweep", str(tmp_path / "sweep.yaml"), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_defaults_of_the_speed_pass(tmp_path: Path) -> None:
    (tmp_path / "sweep.yaml").write_text("model: m\ntasks: [t]\nspeed: {image_size: [336, 672]}\n")
    assert read(Sweep, tmp_path / "sweep.yaml").speed == SpeedOptions(image_size=(336, 672))
