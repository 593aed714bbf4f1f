"""`vtoken calibrate attention_exit`: what it says of a threshold is what the stage does with it; and how every method
says what it found."""

from __future__ import annotations

import json
import math
from pkgutil import iter_modules

import numpy as np
import pytest
import torch
from PIL import Image

import vtoken
from vtoken import config
from vtoken.cli import main
from vtoken.compressors.decoder.attention_exit import AttentionExit
from vtoken.errors import VtokenError
from vtoken.evals import calibrate, reference
from vtoken.evals.calibrate import _attention as search
from vtoken.evals.calibrate._attention import Point, Seen
from vtoken.evals.shared import samples
from vtoken.session import watched


def first_calm(row: list[float], threshold: float, patience: int) -> int:
    """The first column behind `patience` calm ones, itself included."""
    calm = 0
    for k, value in enumerate(row):
        calm = calm + 1 if value < threshold else 0
        if calm >= patience:
            return k
    return len(row)


@pytest.mark.parametrize("patience", [1, 2, 4, 5])
def test_where_images_leave(patience):
    heard = torch.rand(40, 5, generator=torch.Generator().manual_seed(patience))
    heard[::7, 2] = math.inf
    columns = set()
    for threshold in (0.3, 0.7, 0.9, 1.0):
        want = [first_calm(row, threshold, patience) for row in heard.tolist()]
        assert search.leaves_at(heard, threshold, patience).tolist() == want
        columns |= set(want)
    assert columns == {5, *range(patience - 1, 5)}


def test_a_threshold_has_few_digits_and_lies_between():
    assert search.between(0.1, 0.2) == 0.15 and search.between(0.0, 1.0) == 0.5
    assert search.between(0.123456, 0.123458) == 0.123457
    low = 0.1
    assert low < search.between(low, np.nextafter(np.nextafter(low, 1), 1)) < 0.1000001


def seen() -> Seen:
    """Three questions, exits before layers 2 and 3 of 4: what is heard falls; the second answer changes if images leave
    before layer 3, the third before layer 2. The dense model has the first and the third right."""
    heard = torch.tensor([[0.5, 0.1], [0.4, 0.3], [0.8, 0.2]], dtype=torch.float64)
    same = torch.tensor([[True, True, True], [False, False, True], [False, True, True]])
    right = torch.tensor([[True, True, True], [True, False, False], [False, True, True]])
    return Seen(heard, same, right, first=2, patience=1)


def test_the_curve_by_hand():
    points = search.curve(seen())
    found = [(round(3 * p.agreement), round(2 * p.accuracy), round(3 * p.mean_layer)) for p in points]
    # nobody; the first before 3; the third before 3; the second before 3; before 2 the second, the first, the third
    assert found == [(3, 2, 12), (3, 2, 11), (3, 2, 10), (2, 2, 9), (2, 3, 8), (2, 3, 7), (1, 2, 6)]
    assert [p.threshold for p in points] == [0.05, 0.15, 0.25, 0.35, 0.45, 0.65, 0.9]


@pytest.mark.parametrize(
    "kind, target, threshold",
    [("agreement", 1.0, 0.25), ("agreement", 0.6, 0.65), ("accuracy", 1.0, 0.9), ("mean_layer", 3.0, 0.35)],
)
def test_what_is_chosen(kind, target, threshold):
    assert search.choose(search.curve(seen()), kind, target, depth=4).threshold == threshold


def test_the_first_layer_is_searched_too():
    """From layer 3 on nobody is asked before layer 2, where the third question must not lose its picture."""
    first, best, points = search.search(seen(), (2, 3), "agreement", 0.6, depth=4)
    assert (first, best.threshold) == (2, 0.65) and points == search.curve(seen())
    later = search.curve(seen().since(3))
    assert [(p.threshold, round(3 * p.agreement), p.mean_layer) for p in later][-1] == (0.65, 2, 3.0)
    assert search.search(seen(), (2, 3), "mean_layer", 3.4, depth=4)[:2] == (3, later[2])
    assert search.search(seen(), (2, 3), "agreement", 1.0, depth=4)[0] == 3, "both leave at 10/3: the later layer"
    with pytest.raises(VtokenError, match=r"before layer 2\.00 at the earliest"):
        search.search(seen(), (2, 3), "mean_layer", 1, depth=4)


def test_a_lucky_threshold_behind_a_bad_one_is_not_taken():
    points = [
        Point(0.1, 1.0, None, 4.0),
        Point(0.2, 1.0, None, 3.5),
        Point(0.3, 0.8, None, 3.0),
        Point(0.4, 1.0, None, 2.5),
    ]
    assert search.choose(points, "agreement", 0.9, depth=4).threshold == 0.2
    with pytest.raises(
        VtokenError, match=r"no threshold that lets an image go keeps agreement at 90.0%: the next one leaves 80.0%"
    ):
        search.choose([points[0], *points[2:]], "agreement", 0.9, depth=4)
    with pytest.raises(VtokenError, match="nobody was asked"):
        search.choose(points[:1], "agreement", 0.9, depth=4)
    with pytest.raises(VtokenError, match=r"before layer 2\.50 at the earliest, not 2"):
        search.choose(points, "mean_layer", 2, depth=4)
    with pytest.raises(VtokenError, match="none of the answers word for word"):
        search.choose(points, "accuracy", 0.9, depth=4)


@pytest.mark.parametrize("options", [{"first": 1}, {"first": 1, "window": 2, "patience": 2, "sinks": 5}])
def test_it_foretells_what_the_stage_does(options):
    model, processor = reference.load()
    given = samples.read("reference", 6)
    points = search.curve(search.see(model, processor, given, AttentionExit(**options)))
    assert len(points) > 6, "every value is a step"
    dense = said(model, processor, given, None)[0]
    right = [a == s.answer.split() for a, s in zip(dense, given, strict=True)]
    for point in points[:: len(points) // 4]:
        stage = {"attention_exit": {"threshold": point.threshold, **options}}
        answers, layers = said(model, processor, given, [stage])
        assert point.agreement == pytest.approx(sum(a == b for a, b in zip(answers, dense, strict=True)) / 6)
        now = [a == s.answer.split() for a, s in zip(answers, given, strict=True)]
        assert point.accuracy == pytest.approx(sum(now) / sum(right))
        assert point.mean_layer == pytest.approx(sum(layers) / 6), point


def said(model, processor, given, pipeline):
    """Answers as words, and per question the layers that saw its picture."""
    answers, layers = [], []
    with watched(model, pipeline or "none"):
        for sample in given:
            prompt = samples.prepare(model, processor, sample)
            out = model.generate(**prompt, do_sample=False, max_new_tokens=8)[0, prompt["input_ids"].shape[1] :]
            answers.append(processor.decode(out, skip_special_tokens=True).split())
            layers.append(sum(counts != [0] for counts in vtoken.trace(model).layers))
    return answers, layers


def test_the_command(tmp_path, capsys):
    out = tmp_path / "exit.yaml"
    words = ["calibrate", "attention_exit", "tiny-llava", "--limit", "6", "--first", "1", "--mean-layer", "3.5"]
    assert main([*words, "-o", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "chosen" in printed and f"wrote {out}: attention_exit for tiny-llava: of 6 questions" in printed
    (stage,) = config.load(out).stages
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["threshold"] == stage.threshold and found["first"] == stage.first == 1 and found["mean_layer"] <= 3.5
    out.write_text(found["pipeline"])
    assert config.load(out).stages == (stage,) and found["file"] is None
    assert {point["threshold"] for point in found["curve"]} >= {stage.threshold}


@pytest.mark.parametrize(
    "words, message",
    [
        (["--agreement", "99"], "--agreement must be at most 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--limit", "1", "--first", "4"], "between 1 and 3"),
        (["--limit", "1", "--patience", "3"], "--patience must lie between 1 and 2"),
        (["-o", "nowhere/exit.yaml"], "no folder 'nowhere'"),
        (["--limit", "1", "--first", "1", "--mean-layer", "0.5"], "at the earliest, not 0.5"),
        (["--mean-layer", "2", "--agreement", "0.9"], "give one of --agreement, --accuracy and --mean-layer"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert main(["calibrate", "attention_exit", "tiny-llava", *words]) == 2
    assert message in capsys.readouterr().err


def test_accuracy_needs_answers(tmp_path, capsys):
    Image.new("RGB", (192, 192)).save(tmp_path / "a.png")
    (tmp_path / "questions.jsonl").write_text('{"image": "a.png", "question": "what digit is red?"}\n')
    words = ["calibrate", "attention_exit", "tiny-llava", "--data", str(tmp_path), "--accuracy", "0.9"]
    assert main(words) == 2 and "needs an answer to every question" in capsys.readouterr().err


def test_every_method_takes_json(capsys):
    names = [found.name for found in iter_modules(calibrate.__path__) if not found.name.startswith("_")]
    assert {*METHODS, "dtome"} <= {*names}
    for name in names:
        with pytest.raises(SystemExit):
            main(["calibrate", name, "--help"])
        assert "--json" in capsys.readouterr().out, name


METHODS = {
    "vtw": ["--limit", "1", "--tolerance", "9"],
    "fitprune": ["--limit", "1", "--reduction", "20"],
    "mminference": ["--device", "cpu"],
    "attention_exit": ["--limit", "3", "--first", "1", "--mean-layer", "3.5"],
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_prints_one_object(method, capsys, tmp_path):
    words = ["calibrate", method, "tiny-llava", *METHODS[method]]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found)[:3] == ["method", "model", "pipeline"] and found["method"] == method
    if method == "vtw":
        config.load(found["pipeline"])
        return
    (tmp_path / "found.yaml").write_text(found["pipeline"])
    stages = config.load(tmp_path / "found.yaml").stages
    assert main(words) == 0
    streams = capsys.readouterr()
    (tmp_path / "printed.yaml").write_text(streams.out)
    assert config.load(tmp_path / "printed.yaml").stages == stages, "stdout is a pipeline and nothing else"
    assert f"{method} for tiny-llava" in streams.err
