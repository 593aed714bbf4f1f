"""The search on lmms-eval's tasks: accuracy is the tasks' own metric, as `vtoken eval` reports it, as a share of
dense's."""

from __future__ import annotations

import json
import os
from pathlib import Path
from statistics import fmean

import pytest
from tiny_processors import save

pytest.importorskip("optuna")
pytest.importorskip("lmms_eval")

import lmms_tasks

from vtoken import config
from vtoken.cli import main
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals import processors
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.harness import Harness
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.shared import models
from vtoken.evals.shared.options import Workload
from vtoken.evals.tune import samples
from vtoken.evals.tune.quality import Judge
from vtoken.evals.tune.relative_score import RelativeScore
from vtoken.evals.tune.search import Search
from vtoken.evals.tune.space import Space
from vtoken.evals.tune.tasks import Tasks

SPELLED = {"process_results": "!function utils.spelled"}
METRIC = "[{{metric: hit, aggregation: {}, higher_is_better: {}}}]"


def worth(text: str) -> float:
    return sum(map(ord, text)) % 10 / 10


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and tasks whose scorers give tenths for what an answer is spelled of."""
    folder = tmp_path_factory.mktemp("tune_tasks")
    os.environ["LMMS_EVAL_DATASETS_CACHE"] = str(folder / "cache")
    save("llava", folder / "model")
    lmms_tasks.write(folder / "tasks", "five", 5, **SPELLED)
    lmms_tasks.write(folder / "tasks", "three", 3, **SPELLED)
    lmms_tasks.write(folder / "tasks", "best", 4, **SPELLED, metric_list=METRIC.format("!function utils.best", "true"))
    lmms_tasks.write(folder / "tasks", "errors", 2, **SPELLED, metric_list=METRIC.format("mean", "false"))
    lmms_tasks.write(folder / "tasks", "twice", 2, **SPELLED, repeats="2")
    lmms_tasks.write(folder / "tasks", "broken", 2, process_results="!function utils.broken")
    return folder


def tasks(place: Path, *names: str, limit: int | None = None) -> Tasks:
    found = samples.tasks(",".join(names), limit, folders=[place / "tasks"])
    assert found is not None
    return found


@pytest.fixture(scope="module")
def both(place: Path) -> Tasks:
    return tasks(place, "five", "three")


SAID = ["a", "bb", "c d", "", "e", "ff", "g", "hh"]


def test_scorers_say_what_answers_are_worth(both: Tasks, capsys: pytest.CaptureFixture[str]) -> None:
    assert both.of == ["five"] * 5 + ["three"] * 3 and len(both.samples) == 8
    want = [worth(text) for text in SAID]
    assert len(set(want)) > 4
    found = both.grade(SAID)
    assert found.documents == pytest.approx(want)
    assert found.values == pytest.approx({"five": fmean(want[:5]), "three": fmean(want[5:])})
    assert capsys.readouterr() == ("", "")  # lmms-eval's bars would come again with every trial
    some = both.grade(SAID[:6])
    assert some.documents == pytest.approx([*want[:6], 0, 0]) and some.values["three"] == pytest.approx(want[5] / 3)


def test_documents_that_are_asked_twice(place: Path) -> None:
    found = tasks(place, "twice")
    assert len(found.samples) == 4
    # lmms-eval scores the first of a document's answers.
    assert found.grade(["c", "e", "g", ""]).documents == pytest.approx([0.9, 0.9, 0.3, 0.3])


def test_marks_are_shares_of_dense_task_by_task(both: Tasks) -> None:
    relative = RelativeScore(both, SAID)
    assert relative.steady and relative.quality == pytest.approx(1)
    other = SAID[::-1]
    want = [worth(text) for text in other]
    own, dense = ((fmean(v[:5]), fmean(v[5:])) for v in (want, [worth(text) for text in SAID]))
    found = relative.of(other)
    assert relative.quality == pytest.approx((own[0] / dense[0] + own[1] / dense[1]) / 2)
    assert fmean(found) == pytest.approx(relative.quality) and relative.values == pytest.approx(
        dict(zip(both.names, own, strict=True))
    )
    assert relative.of(other[:6]) == pytest.approx(found[:6])
    assert all(score <= most for score, most in zip(found, relative.most, strict=True))
    assert fmean(relative.most) == pytest.approx((1 / dense[0] + 1 / dense[1]) / 2)


def test_a_metric_that_is_no_mean_is_told_at_the_end(place: Path) -> None:
    # The best of equal documents is their mean too: only others tell.
    one = RelativeScore(tasks(place, "best"), ["c", "c", "c", "c"])
    assert one.base == {"best": pytest.approx(0.9)} and not one.steady
    found = one.of(["e", "e", "g", ""])
    assert found == pytest.approx([3 / 9] * 4) and one.quality == pytest.approx(3 / 9)


def test_metrics_that_cannot_be_kept(place: Path, both: Tasks) -> None:
    with pytest.raises(ConfigError, match="hit of task errors is better when it is lower; take --quality agreement"):
        RelativeScore(tasks(place, "errors"), ["b", "b"])
    with pytest.raises(ConfigError, match="score on task three is 0, of which no share can be kept"):
        RelativeScore(both, SAID[:5])
    with pytest.raises(VtokenError, match="task broken cannot be scored: ZeroDivisionError"):
        tasks(place, "broken")


@pytest.mark.parametrize("batch", [1, 3])
def test_accuracy_is_what_vtoken_eval_reports(place: Path, both: Tasks, batch: int) -> None:
    generator = TextGenerator(models.load(str(place / "model"), device="cpu"), processors.load(place / "model"))
    judge = Judge(generator, both.samples, "accuracy", batch, both, chunk=2)
    streamed = list(judge.scores(config.load("random:2")))
    assert judge.relative is not None and generator.pipeline is None
    assert [len(scores) for scores in streamed] == ([2, 2, 2, 2] if batch == 1 else [3, 3, 2])
    scores = [score for each in streamed for score in each]
    model, harness = VtokenModel(str(place / "model"), device="cpu"), Harness(both.names, [place / "tasks"])
    for values, pipeline in ((judge.relative.base, "none"), (judge.relative.values, "random:2")):
        model.use(config.load(pipeline))
        assert values == {name: harness.run(model, name, None, place / "scorers").value for name in both.names}
    assert judge.relative.values != judge.relative.base
    assert judge.quality(scores) == pytest.approx(fmean(scores)) and judge.dense == 1
    assert judge.quality([0.0] * 8) == judge.relative.quality > 0  # the metric has the last word


def test_trials_are_stopped_by_what_tasks_leave_possible(place: Path, both: Tasks, tmp_path: Path) -> None:
    generator = TextGenerator(models.load(str(place / "model"), device="cpu"), processors.load(place / "model"))
    judge = Judge(generator, both.samples, "accuracy", 1, both, chunk=2)
    asked = 0

    def mute(batch: object) -> list[str]:
        nonlocal asked
        asked += 1
        return [""]

    judge._answers = mute  # type: ignore[method-assign, assignment]
    space = Space(alternatives={"random": [{"random": {"keep": {"values": [2]}}}]})
    search = Search(judge, space, tmp_path, Workload(text_tokens=8, new_tokens=1), "flops", 0.98, 2, 0, {})
    search.run(1)
    bounds = [sum(judge.most[k:]) / 8 for k in (2, 4, 6)]
    left = next(k for k, bound in zip((2, 4, 6, 8), [*bounds, 0], strict=True) if bound < 0.98)
    assert asked == left
    (trial,) = search.to_dict()["trials"]
    assert (trial["stopped"] is not None) == (left < 8) and search.to_dict()["dense"] == judge.relative.base  # type: ignore[union-attr]


def test_the_command(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "space.yaml").write_text("alternatives: {a: [random: {keep: {low: 1, high: 8}}]}\n")
    out = tmp_path / "o"
    words = ["tune", str(place / "model"), "--data", "five", "--include", str(place / "tasks"), "--limit", "4"]
    words += ["--space", str(tmp_path / "space.yaml"), "--trials", "2", "--keep-accuracy", "10%", "--out", str(out)]
    assert main(words) == 0
    found = json.loads((out / "tune.json").read_text())
    assert f"dense: five {found['dense']['five']:.6g}" in capsys.readouterr().out
    assert found["about"]["quality"] == "accuracy" and found["about"]["scorers"] == ["five"]
    best = found["trials"][found["best"][0]]
    assert best["quality"] == pytest.approx(best["tasks"]["five"] / found["dense"]["five"])
    assert f"; five {best['tasks']['five']:.6g}" in (out / "best-1.yaml").read_text().splitlines()[0]
    assert main([*words, "--quality", "agreement"]) == 2
    assert "a study with another" in capsys.readouterr().err
