"""What `vtoken report` says of a made-up run, against hand counts; fronts against their definition."""

from __future__ import annotations

import json
import re
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from eval_folder import run, write
from html_page import Page

from vtoken.cli import main
from vtoken.errors import VtokenError
from vtoken.evals.pictures.plots import fronts, looks
from vtoken.evals.quality import regressions, report
from vtoken.evals.quality.analysis import analyse, front, read

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
    found = analyse(read(folder))
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
        analyse(
            read(write(tmp_path / f"{n}", [run("dense", None, {"t": theirs}), run("p", "p", {"t": mine})], pictures=n))
        )["pipelines"][1]["tasks"]["t"]["difference"]
        for n in (30, 120)
    )
    assert narrow[2] - narrow[1] < 0.65 * (wide[2] - wide[1])


def test_lower_is_better_and_missing_scores(tmp_path: Path) -> None:
    rows = [run("dense", None, {"t": [1.0, 3.0, None, 2.0]}), run("p", "p", {"t": [2.0, 3.0, 1.0, None]})]
    task = analyse(read(write(tmp_path / "out", rows, pictures=4, higher=False)))["pipelines"][1]["tasks"]["t"]
    assert task["scored"] == 2 and task["difference"][0] == -0.5  # worse
    assert task["of_dense"] is None and task["lost"] is None


def test_a_value_that_is_no_mean_is_marked(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    results["runs"][2]["tasks"]["one"]["of_dense"] = 0.5
    (folder / "results.json").write_text(json.dumps(results))
    found = analyse(read(folder))
    assert [found["pipelines"][2]["tasks"][name]["own_mean"] for name in ("one", "two")] == [False, True]
    assert "(mean of documents)" in report.markdown(found)


def test_the_page_is_whole_and_shows_the_numbers(folder: Path) -> None:
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert not page.open and "<link" not in text and not re.findall(r"url\((?!#)", text)
    assert re.findall("<script.*?>", text) == ["<script>"]
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
    shown = re.findall(
        r"<figure data-name=\".*?\">(<img.*?>)?<figcaption><b>(.*?)</b><br>.*?<span class=\"(\w+)\"", text
    )
    assert [(bool(picture), name, how) for picture, name, how in shown] == [
        (True, "dense", "right"),
        (False, "bad:8", "wrong"),
        (True, "good:8", "right"),
    ]
    assert "| bad:8 | 0.7 | 87.5 |" in (folder / "table.md").read_text()


def test_of_many_methods_those_on_a_front_are_coloured(tmp_path: Path) -> None:
    rows = [run("dense", None, {"t": RIGHT})]
    rows += [run(f"m{k}", f"m{k}", {"t": WORSE}, visual=90 - 9 * k, ttft=0.9 - k / 10, flops=900 - k) for k in range(6)]
    few, crowd = (read(write(tmp_path / f"{n}", rows[:n], pictures=10)) for n in (6, 7))
    found = [analyse(each) for each in (few, crowd)]
    assert [looks(each["pipelines"])["m4"][0] for each in found] == ["series-4", "soft"]
    # Equally good, so the cheapest is alone on every front.
    assert [name for name, look in looks(found[1]["pipelines"]).items() if look[0] != "soft"] == ["m5"]
    texts = [report.render(each, said) for each, said in zip((few, crowd), found, strict=True)]
    keys = [re.findall(r'var\(--([\w-]+)\)">.</b>&nbsp;(\w+)</span>', text) for text in texts]
    assert keys == [[(f"series-{k}", f"m{k}") for k in range(5)], [("series-0", "m5"), ("soft", "others")]]
    assert ["Method by method" in text for text in texts] == [False, True]
    assert all(f">m{k}</text>" in texts[1] for k in range(6))


def test_budgets_of_a_method_are_one_line(tmp_path: Path) -> None:
    """As many points as budgets, from few tokens to many, whatever the order in which they ran."""
    rows = [run("dense", None, {"t": RIGHT})]
    rows += [run(f"a:{n}", f"a: {{keep: {n}}}", {"t": WORSE}, visual=n) for n in (8, 32, 16)]
    rows.insert(2, run("b", "b", {"t": RIGHT}, visual=4))
    found = analyse(read(write(tmp_path / "out", rows, pictures=10)))["pipelines"]
    paths = re.findall(r'<path d="([^"]*)"[^>]*stroke: var\(--series-0\)', fronts(found, "tokens", "x"))
    (line,) = [path for path in paths if path.count("L") == 2]  # whiskers have one, markers none
    x = [float(each) for each in re.findall(r"[ML] ([\d.]+)", line)]
    assert len(x) == 3 and x == sorted(x)
    assert [row["name"] for row in report.grouped(found)] == ["dense", "a:32", "a:16", "a:8", "b"]


def test_times_of_a_speed_pass_count(folder: Path) -> None:
    def timed(name: str, ms: float, ratio: float | None) -> dict[str, Any]:
        spread = None if ratio is None else {"ttft": {"median": ratio, "low": ratio - 0.01, "high": ratio + 0.02}}
        return {"name": name, "milliseconds": {"ttft": {"median": ms, "low": ms, "high": ms}}, "to_dense": spread}

    assert not analyse(read(folder))["benched"]
    results = json.loads((folder / "results.json").read_text())
    results["speed"] = {
        "rows": [timed("dense", 40, None), timed("good:8", 50, 1.3), timed("bad:8", 10, 0.3), timed("dense", 40, 1)]
    }
    (folder / "results.json").write_text(json.dumps(results))
    evaluation = read(folder)
    found = analyse(evaluation)
    dense, good, bad = found["pipelines"]
    assert [(row["ttft"], row["ttft_ratio"]) for row in (dense, good, bad)] == [(0.04, 1.0), (0.05, 1.3), (0.01, 0.3)]
    assert (bad["ttft_low"], bad["ttft_high"], dense["ttft_low"]) == (pytest.approx(0.29), pytest.approx(0.32), None)
    assert "ttft_ratio" in bad["fronts"] and "ttft_ratio" not in good["fronts"]
    text = report.render(evaluation, found)
    assert "0.29–0.32" in text and "of the speed pass" in text
    # What deciding costs was measured with the answers, so its share is one of their time: 1.5 of 500 ms.
    assert "<td>1.50</td><td>0.3</td>" in text


def test_a_long_table_is_folded(tmp_path: Path) -> None:
    rows = [run("dense", None, {"t": RIGHT})]
    rows += [run(f"m:{k}", f"m: {{keep: {k}}}", {"t": WORSE}, visual=k) for k in range(1, 31)]
    texts = [
        report.render(each, analyse(each))
        for each in (read(write(tmp_path / f"{n}", rows[:n], pictures=10)) for n in (3, 31))
    ]
    assert ["<details>" in text for text in texts] == [False, True]
    assert ['id="filter"' in text for text in texts] == [False, True]
    assert not Page(texts[1]).open
    named = re.findall(r'<tr data-name="(.*?)"( data-front)?', texts[1])
    assert len(named) == 31 + 31 + 30 and ("m:1", " data-front") in named and ("m:2", "") in named


def test_without_the_extra_there_are_tables_and_advice(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "find_spec", lambda name: None if name == "jinja2" else object())
    assert main(["report", str(folder)]) == 0
    assert "pip install jinja2 matplotlib" in capsys.readouterr().out
    assert (folder / "table.md").exists() and not (folder / "report.html").exists()


def test_a_page_without_a_folder_is_refused_before_anything_is_written(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(folder), "--out", str(folder / "no" / "page.html")]) == 2
    assert "no folder" in capsys.readouterr().err and not (folder / "table.md").exists()


def test_json_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == analyse(read(folder))
    assert not (folder / "table.md").exists()


def test_an_unfinished_run_counts_for_what_finished(folder: Path) -> None:
    results = json.loads((folder / "results.json").read_text())
    del results["runs"][2]["tasks"]["two"]
    results |= {"complete": False, "drift": None, "cases": []}
    (folder / "results.json").write_text(json.dumps(results))
    evaluation = read(folder)
    found = analyse(evaluation)
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


def test_a_document_that_one_pipeline_has_no_score_of_is_shown(tmp_path: Path) -> None:
    rows = [run("dense", None, {"one": RIGHT}), run("bad:8", "bad", {"one": [None, *RIGHT[1:]]})]
    (case,) = report.cases(read(write(tmp_path / "out", rows, pictures=5, cases=[CASE])))
    assert [(panel.pipeline, panel.right) for panel in case.panels] == [("dense", True), ("bad:8", True)]


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


def test_of_many_pipelines_all_are_shown() -> None:
    dense = [{"task": "t", "doc": k, "score": 1.0, "media": f"p{k}"} for k in range(40)]
    rng = np.random.default_rng(1)
    lost = {f"m{k}": [{**line, "score": float(rng.random() < 0.5)} for line in dense] for k in range(60)}
    found = regressions.worst(dense, lost, {"t": 1.0})
    assert len(found) == -(-60 // regressions.PANELS) and {len(case["shown"]) for case in found} == {regressions.PANELS}
    times = Counter(name for case in found for name in case["shown"])
    assert set(times) == set(lost) and max(times.values()) <= 2
    for case in found:  # whoever is shown first lost it
        assert lost[case["shown"][0]][case["doc"]]["score"] == 0
    one = regressions.worst(dense[:1], {name: lines[:1] for name, lines in lost.items()}, {"t": 1.0})
    assert len(one) == 1 and len({case["doc"] for case in found}) == len(found)


@pytest.mark.parametrize(("first", "second"), list(product((0.2, 0.9), repeat=2)))
def test_equal_points_all_stay(first: float, second: float) -> None:
    assert front([(first, second)] * 3) == [0, 1, 2]
