"""What `vtoken report` says of a made-up run, against hand counts; fronts against their definition."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_folder import run, write
from test_report import Page

from vtoken.cli import main
from vtoken.errors import VtokenError
from vtoken.evals.lmms import regressions, report
from vtoken.evals.lmms.findings import findings, read
from vtoken.evals.lmms.pareto import front

RIGHT = [1.0] * 8 + [0.0] * 2
WORSE = [0.0, 0.0, *[1.0] * 6, 1.0, 0.0]  # lost 2, won 1
HALF = [1.0, 0.0] * 5
CASE = {"task": "one", "doc": 0, "panels": {"dense": "cases/0-0.jpg", "good:8": "cases/0-0.jpg", "bad:8": None}}


def runs() -> list[dict[str, Any]]:
    return [
        run("dense", None, {"one": RIGHT, "two": HALF}),
        run("good:8", "good: {keep: 8}", {"one": RIGHT, "two": HALF}, visual=8, flops=500, ttft=0.3),
        run("bad:8", "bad: {keep: 8}", {"one": WORSE, "two": HALF}, visual=8, flops=400, ttft=0.5),
        run("dense", None, {"one": RIGHT, "two": HALF}, ttft=0.44),
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "out", runs(), pictures=5, cases=[CASE])


def test_the_front_is_what_nobody_dominates() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        points = [tuple(map(float, p)) for p in rng.integers(5, size=(12, 2))]
        free = {
            k
            for k, (cost, quality) in enumerate(points)
            if not any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points)
        }
        found = front(points)
        assert set(found) == free and [points[k][0] for k in found] == sorted(points[k][0] for k in found)
    assert front([]) == []


def test_numbers_by_hand(folder: Path) -> None:
    found = findings(read(folder))
    dense, good, bad = found["pipelines"]  # the last dense run is drift, not a row
    assert [row["name"] for row in found["pipelines"]] == ["dense", "good:8", "bad:8"] and bad["method"] == "bad"
    assert found["tasks"]["one"]["pictures"] == 5
    one = bad["tasks"]["one"]
    assert (one["lost"], one["won"], one["p"]) == (2, 1, 1.0)
    assert one["of_dense"] == pytest.approx(7 / 8) == one["interval"][0] and one["same"] == 0.7
    assert bad["quality"] == pytest.approx((7 / 8 + 1) / 2)
    # Documents k and k + 5 share a picture: every bootstrap sample of the other task gives 1, so half the width stays.
    assert bad["low"] == pytest.approx(bad["quality"] - (one["interval"][0] - one["interval"][1]) / 2)
    assert (bad["flops_ratio"], bad["ttft_ratio"], bad["tokens"], bad["entry"]) == (0.4, 1.25, 4, 8)
    assert bad["stages"] == {"toy@2": 0.0015} and dense["stages"] == {} and bad["stage_flops"] == 7
    assert good["fronts"] == ["tokens", "flops_ratio", "ttft_ratio"] and bad["fronts"] == ["flops_ratio"]
    assert dense["fronts"] == [] and dense["tasks"]["one"]["interval"] is None
    json.dumps(found)


def test_intervals_are_drawn_over_pictures(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    scores = np.repeat(rng.integers(2, size=(2, 30)), 4, axis=1).astype(float).reshape(2, 30, 4).transpose(0, 2, 1)
    mine, theirs = scores.reshape(2, 120).tolist()
    wide, narrow = (
        findings(
            read(write(tmp_path / f"{n}", [run("dense", None, {"t": theirs}), run("p", "p", {"t": mine})], pictures=n))
        )["pipelines"][1]["tasks"]["t"]["difference"]
        for n in (30, 120)
    )
    assert narrow[2] - narrow[1] < 0.65 * (wide[2] - wide[1])


def test_lower_is_better_and_missing_scores(tmp_path: Path) -> None:
    rows = [run("dense", None, {"t": [1.0, 3.0, None, 2.0]}), run("p", "p", {"t": [2.0, 3.0, 1.0, None]})]
    task = findings(read(write(tmp_path / "out", rows, pictures=4, higher=False)))["pipelines"][1]["tasks"]["t"]
    assert task["scored"] == 2 and task["difference"][0] == -0.5  # worse
    assert task["of_dense"] is None and task["lost"] is None


def test_a_value_that_is_no_mean_is_marked(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["runs"][2]["tasks"]["one"]["of_dense"] = 0.5
    (folder / "results.json").write_text(json.dumps(results))
    found = findings(read(folder))
    assert [found["pipelines"][2]["tasks"][name]["own_mean"] for name in ("one", "two")] == [False, True]
    assert "(mean of documents)" in report.markdown(found)


def test_the_page_is_whole_and_shows_the_numbers(folder: Path) -> None:
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.open and "<script" not in text and "<link" not in text and not re.findall(r"url\((?!#)", text)
    assert page.fetched and all(link.startswith(("data:image/", "#")) for link in page.fetched)
    cells = [" ".join(" ".join(row).split()) for row in page.rows]
    assert any(cell.startswith("bad:8 4 8 at entry 93.8") and cell.endswith("500.0 1.25") for cell in cells)
    assert any(cell.startswith("bad:8 0.7 87.5") and "2 : 1" in cell for cell in cells)
    assert "bad:8 toy@2 1.50 0.3 7e-06 MFLOP" in cells
    assert text.count('aria-label="percent of dense against') == 3
    assert [
        re.sub(r"<.*?>", "", found) for found in re.findall(r"<figcaption class=\"soft\">(.*?)</figcaption>", text)
    ] == [
        "Front: good:8",
        "Front: bad:8, good:8",
        "Front: good:8",
    ]
    assert "what is &lt;0&gt;?" in text and "are too few for an interval" in text
    # Dense first, then what lost the document, without a picture where none was drawn.
    shown = re.findall(r"<figure>(<img.*?>)?<figcaption><b>(.*?)</b><br>.*?<span class=\"(\w+)\"", text)
    assert [(bool(picture), name, how) for picture, name, how in shown] == [
        (True, "dense", "right"),
        (False, "bad:8", "wrong"),
        (True, "good:8", "right"),
    ]
    assert "| bad:8 | 0.7 | 87.5 |" in (folder / "table.md").read_text()


def test_many_methods_share_a_look(tmp_path: Path) -> None:
    rows = [run("dense", None, {"t": RIGHT})]
    rows += [run(f"m{k}", f"m{k}", {"t": WORSE}, visual=10 * k + 9) for k in range(6)]
    few, crowd = (write(tmp_path / f"{n}", rows[:n], pictures=10) for n in (6, 7))
    texts = [report.render(each, findings(each)) for each in map(read, (few, crowd))]
    assert ["●" in text and "series-4" in text.split("<body>")[1] for text in texts] == [True, False]


def test_without_the_extra_there_are_tables_and_advice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else object())
    assert main(["report", str(folder)]) == 0
    assert 'pip install "vtoken[plot]"' in capsys.readouterr().out
    assert (folder / "table.md").exists() and not (folder / "report.html").exists()


def test_json_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == findings(read(folder))
    assert not (folder / "table.md").exists()


def test_an_unfinished_run_counts_for_what_finished(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    del results["runs"][2]["tasks"]["two"]
    results |= {"complete": False, "drift": None, "cases": []}
    (folder / "results.json").write_text(json.dumps(results))
    evaluation = read(folder)
    found = findings(evaluation)
    assert [row["name"] for row in found["pipelines"]] == ["dense", "good:8"]
    assert "The run was interrupted" in report.render(evaluation, found) and "Not complete" in report.markdown(found)
    (folder / "results.json").write_text(json.dumps({**results, "runs": []}))
    with pytest.raises(VtokenError, match="no finished run"):
        read(folder)
    (folder / "results.json").write_text(json.dumps({**results, "schema": "other/2"}))
    with pytest.raises(VtokenError, match="schema 'other/2'"):
        read(folder)
    with pytest.raises(VtokenError, match=r"no results\.json in"):
        read(folder / "cases")


def test_the_worst_of_every_pipeline_in_turn() -> None:
    dense = [{"task": "t", "doc": k, "score": 1.0, "media": f"p{k // 2}"} for k in range(8)]

    def scored(*scores: float | None) -> list[dict[str, Any]]:
        return [{**line, "score": score} for line, score in zip(dense, scores, strict=True)]

    a = scored(1, 0.5, 1, 0, 1, 1, 0, 1)
    b = scored(0, 1, 1, 1, 0.2, 1, 1, None)
    found = regressions.worst(dense, {"a": a, "b": b}, {"t": 1.0})
    # a's worst first, then b's; document 1 shows the picture of document 0, which was taken.
    assert [(case["doc"], case["shown"]) for case in found] == [
        (3, ["a", "b"]),
        (0, ["b", "a"]),
        (6, ["a", "b"]),
        (4, ["b", "a"]),
    ]
    assert regressions.worst(dense, {"a": a}, {"t": -1.0}) == []
    many = {f"m{k}": scored(*[0.0] * 8) for k in range(20)}
    assert len(regressions.worst(dense, many, {})[0]["shown"]) == regressions.PANELS


@pytest.mark.parametrize(("first", "second"), list(product((0.2, 0.9), repeat=2)))
def test_equal_points_all_stay(first: float, second: float) -> None:
    assert front([(first, second)] * 3) == [0, 1, 2]
