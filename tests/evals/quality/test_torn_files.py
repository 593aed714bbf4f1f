"""Torn, empty and foreign files in the folders of `vtoken eval` and `vtoken sweep`: refused in one line, never by a
traceback."""

from __future__ import annotations

import json
import warnings

import eval_folder
import pytest
from PIL import Image

pytest.importorskip("lmms_eval")

from vtoken.cli import main
from vtoken.errors import VtokenError
from vtoken.evals.quality import points, report
from vtoken.evals.quality.analysis import analyse, read
from vtoken.evals.quality.results import assemble
from vtoken.evals.shared.dense import DENSE

COST = {"prompt_tokens": 9, "input_tokens": 9, "visual_tokens": 4, "visual_tokens_entry": 4, "visual_tokens_mean": 4.0, "new_tokens": 1,
        "batch": 1, "preprocess_s": 0.1, "ttft_s": 0.1, "decode_s": 0.1, "stages": {"fastv@2": 0.1}}  # fmt: skip
LINE = {"task": "odd", "doc": 0, "repeat": 0, "answer": "a", "media": None, "score": 1.0, **COST}
POINT = {
    "conditions": {},
    "about": {"metric": "hit", "scale": 1, "higher_is_better": True, "docs": 1, "hash": "0", "leaves": {"odd": {}}},
    "value": 1.0,
    "flops": {"doc": 0, "total": 1, "language": 1, "stages": 0},
    "metrics": {"odd": {"hit": 1.0}},
    "requests": [LINE],
}
CASES = [{"task": "odd", "doc": 0, "panels": {"dense": "cases/0-0.jpg", "random": None}}]
SPEED = {"rows": [{"name": "dense", "to_dense": None, "milliseconds": {"ttft": {"median": 1.0}}}]}
KINDS = {"point": (POINT, points.is_point), "cases": (CASES, points.is_cases), "speed": (SPEED, points.is_speed)}
FOREIGN = (None, 1, "text", [], {}, [1], [None], [[]], {"rows": 1}, {"rows": [1]}, {"requests": []}, {"error": "no"})


def is_point(what, tmp_path):
    """What `whole.kept` says of it."""
    points.save(tmp_path, "x", what)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return points.load(tmp_path, "x", points.is_point) is not None


def without(what):
    """The same with one key less, anywhere."""
    if isinstance(what, dict):
        for key, value in what.items():
            yield {k: v for k, v in what.items() if k != key}
            yield from ({**what, key: less} for less in without(value))
    elif isinstance(what, list) and what:
        yield from ([less, *what[1:]] for less in without(what[0]))


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept(kind, tmp_path):
    good, fits = KINDS[kind]
    (tmp_path / "points").mkdir()
    assert points.load(tmp_path, "x", fits) is None, "nothing there"
    points.save(tmp_path, "x", good)
    file = points.file_of(tmp_path, "x")
    assert points.load(tmp_path, "x", fits) == good and [f.name for f in file.parent.iterdir()] == ["x.json"]
    data = file.read_bytes()
    torn = [b"", data[: len(data) // 2], data[:-3], b"\xff\xfe" + data, b"\0" * 50, b"[" * 100_000, b"NaN"]
    other = [json.dumps(x).encode() for x in FOREIGN if not (kind == "cases" and x == [])]
    for wrong in (*torn, *other):
        file.write_bytes(wrong)
        with pytest.warns(UserWarning, match=f"{file} .*taken as missing"):
            assert points.load(tmp_path, "x", fits) is None
    file.unlink()
    file.mkdir()
    with pytest.warns(UserWarning, match="taken as missing"):
        assert points.load(tmp_path, "x", fits) is None


def test_a_point_that_passes_can_be_used(tmp_path):
    """Whatever key is missing, anywhere: it is refused, or nobody reads it."""
    (tmp_path / "points").mkdir()
    found = [less for less in without(POINT) if not is_point(less, tmp_path)]
    assert len(found) > len(COST) + len(POINT)
    for less in without(POINT):
        if is_point(less, tmp_path):
            assert assemble(tmp_path, "m", "", [DENSE], {points.Point(0, DENSE, "odd"): less}) is not None
            assert set(less) == set(POINT) and set(less["about"]) == set(POINT["about"])


def test_pictures_of_cases_stay_in_their_folder(tmp_path):
    (tmp_path / "points").mkdir()
    for name in ("../x.jpg", "/etc/passwd", "points/x.json", 3, "cases/../../x"):
        points.save(tmp_path, "x", [{**CASES[0], "panels": {"dense": name}}])
        with pytest.warns(UserWarning, match="taken as missing"):
            assert points.load(tmp_path, "x", points.is_cases) is None


@pytest.fixture
def folder(tmp_path):
    runs = [
        eval_folder.run("dense", None, {"a": [1.0, 1.0, 0.0]}),
        eval_folder.run("uniform", "uniform: {keep: 5}", {"a": [1.0, 0.0, 0.0]}, visual=10.0),
    ]
    case = {"task": "a", "doc": 1, "panels": {"dense": "cases/0-0.jpg", "uniform": None}}
    return eval_folder.write(tmp_path / "e", runs, 3, cases=[case])


def refusal(folder, capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        code = main(["report", str(folder), "--json"])
    _, err = capsys.readouterr()
    assert code != 0 and "Traceback" not in err and len(err.strip().splitlines()) == 1, err
    return err


def test_results_that_are_none(folder, capsys):
    file = folder / "results.json"
    good = json.loads(file.read_text())
    for wrong in ("", "{", file.read_text()[:-40], "[]", "1", "[" * 100_000):
        file.write_text(wrong)
        assert str(file) in refusal(folder, capsys)
    for key in good:
        file.write_text(json.dumps({k: v for k, v in good.items() if k != key}))
        assert "results.json" in refusal(folder, capsys)
        for other in (None, 3, "x", ["x"], {"x": 1}):
            if other is not None or key not in ("drift", "cases"):
                file.write_text(json.dumps({**good, key: other}))
                if key in ("model", "command", "complete", "drift", "conditions", "cases"):
                    continue
                assert str(folder) in refusal(folder, capsys)
    for run in ({"name": 1}, {**good["runs"][0], "tasks": {"a": 1}}, {**good["runs"][0], "tasks": {"a": {}}}, 3):
        file.write_text(json.dumps({**good, "runs": [run]}))
        assert "results.json" in refusal(folder, capsys)


def test_lines_that_are_torn(folder, capsys):
    file = folder / "requests" / "1.jsonl"
    text = file.read_text()
    for wrong in (text[:-9], "x\n", "3\n", "{}\n", "\0"):
        file.write_text(wrong)
        assert "1.jsonl" in refusal(folder, capsys)
    file.unlink()
    assert "1.jsonl" in refusal(folder, capsys)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "requests/../../secret", "link", 3, None, "requests"])
def test_no_path_leads_out_of_the_folder(name, folder, capsys):
    (folder.parent / "secret").write_text(json.dumps({"task": "a"}) + "\n")
    (folder / "link").symlink_to(folder.parent / "secret")
    file = folder / "results.json"
    good = json.loads(file.read_text())
    file.write_text(json.dumps({**good, "runs": [{**good["runs"][0], "requests": name}]}))
    message = refusal(folder, capsys)
    assert "results.json" in message or name == "requests"


def test_pictures_are_those_of_the_folder(folder):
    Image.new("RGB", (4, 4)).save(folder.parent / "secret.jpg")
    file = folder / "results.json"
    good = json.loads(file.read_text())
    evaluation = read(folder)
    assert len(report.cases(evaluation)[0].panels) == 2
    for name in ("../secret.jpg", str(folder.parent / "secret.jpg")):
        good["cases"][0]["panels"]["dense"] = name
        file.write_text(json.dumps(good))
        with pytest.raises(VtokenError, match="no file in its folder"):
            report.cases(read(folder))
    good["cases"][0]["panels"]["dense"] = "cases/0-0.jpg"
    file.write_text(json.dumps(good))
    (folder / "cases" / "0-0.jpg").write_bytes(b"torn")
    with pytest.raises(VtokenError, match=r"0-0\.jpg"):
        report.cases(read(folder))
    assert analyse(evaluation)
