"""What exits are calibrated and trained on: withdrawal from one forward, labels, gates, and the commands around
them."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from batches import rows_for
from modes import alone, families
from torch.nn.functional import cross_entropy
from watchers import Watcher

import vtoken
from vtoken import config
from vtoken.cli import main
from vtoken.compressors.decoder._gates import header, question
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import reference
from vtoken.evals.calibrate import _train_exit_gates as exits
from vtoken.evals.calibrate import vtw
from vtoken.evals.calibrate._exit_reference import ExitReference
from vtoken.evals.calibrate._training import kept_back
from vtoken.evals.shared import samples


@families
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_withdrawal_says_what_vtw_says(family, attn):
    model = tiny.make(family, attn)
    for row in (0, 1):
        one = alone(model, tiny.build(model, rows_for(family, "ragged"), seed=3), row)
        run = ExitReference(model, one)
        with torch.no_grad():
            torch.testing.assert_close(run.full, model(**one).logits[0, run.columns], atol=1e-5, rtol=1e-5)
        placeholders = ((one["input_ids"] == tiny.IMG) | tiny.family(family).breaks(one["input_ids"]))[0]
        assert run.columns.tolist() == (~placeholders).nonzero()[:, 0].tolist()
        assert run.columns[run.behind] == placeholders.nonzero().max() + 1
        for k in (1, 2, 3):
            with vtoken.wrapped(model, [{"vtw": {"layer": k}}]), torch.no_grad():
                want = model(**one).logits[0, run.columns]
            torch.testing.assert_close(run.without(k), want, atol=2e-5, rtol=1e-4)
    assert not any(layer._forward_pre_hooks for layer in model.get_decoder().layers)


def test_withdrawal_is_of_one_prompt_with_an_image():
    model = tiny.make("llava")
    for rows in ([[3]], [[3, "img", 2], [1, "img", 2]]):
        with pytest.raises(UnsupportedError, match="one prompt with an image"):
            ExitReference(model, tiny.build(model, rows, seed=3))


def test_labels_and_features_are_those_of_wrapped_runs():
    """The definition with a wrapped model, exit layer by exit layer; what gates are shown is what the stage sees at
    prefill."""
    model, processor = reference.load()
    asked = samples.read("reference", 12)
    seen = exits.table(model, processor, asked)
    found = set()
    for k, sample in enumerate(asked):
        prompt = samples.prepare(model, processor, sample)
        answer = torch.tensor([*processor.tokenizer(sample.answer).input_ids, 2])
        answer = answer[answer != 1]
        whole = samples.continued(prompt, answer)
        with torch.no_grad():
            full = model(**whole).logits[0, -len(answer) - 1 : -1]
        for layer in (1, 2, 3):
            with vtoken.wrapped(model, [{"vtw": {"layer": layer}}]), torch.no_grad():
                now = model(**whole).logits[0, -len(answer) - 1 : -1]
            same = bool((now.argmax(1) == full.argmax(1)).all())
            want = same and float(cross_entropy(now, answer)) < 1.03 * float(cross_entropy(full, answer))
            assert bool(seen.leave[k, layer - 1]) == want
            found.add(want)
        watcher = Watcher(at=(1, 2, 3), asks=("later_text",), seen={})
        with vtoken.wrapped(model, [watcher]), torch.no_grad():
            model(**prompt)
        shown = [question(watcher.seen[layer].fact("later_text")[0]) for layer in (1, 2, 3)]
        torch.testing.assert_close(torch.stack(shown), seen.shown[k], atol=2e-4, rtol=1e-4)
    assert found == {True, False}


def test_an_answer_that_is_not_given_is_the_models_own():
    model, processor = reference.load()
    (given,) = samples.read("reference", 1)
    free = samples.Sample(given.image, given.question)
    prompt = samples.prepare(model, processor, free)
    own = samples.answer_of(model, processor, free, prompt, 8)
    (said,) = reference.answers(model, processor, reference.questions(1))
    assert processor.tokenizer.decode(own, skip_special_tokens=True) == said and own[-1] == 2
    assert samples.answer_of(model, processor, free, prompt, 1).tolist() == own[:1].tolist()


def test_unchanged_asks_for_both_bounds():
    answer = torch.tensor([0, 1])
    full = torch.tensor([[2.0, 0], [0, 2.0]])
    assert exits.unchanged(full, full, answer) and exits.unchanged(2 * full, full, answer)
    assert not exits.unchanged(0.9 * full, full, answer), "the loss rises by more than 3%"
    assert exits.unchanged(0.99 * full, full, answer)
    flipped = torch.tensor([[9.0, 0], [0.1, 0]])
    assert float(cross_entropy(flipped, answer)) > 0 and not exits.unchanged(flipped, full.flip(1), answer)
    wrong = torch.tensor([[-0.1, 0], [0, 9.0]])
    assert not exits.unchanged(wrong, 0.1 * full, answer), "another prediction, though the loss is lower"


def test_gates_learn_what_can_be_learnt():
    """Layer 1 leaves where channel 0 is positive, layer 2 always."""
    generator = torch.Generator().manual_seed(0)
    shown = torch.randn(300, 2, 6, generator=generator)
    leave = torch.stack([shown[:, 0, 0] > 0, torch.ones(300, dtype=torch.bool)], 1)
    seen = exits.Table(shown, leave)
    gates = exits.train(seen.rows(torch.arange(200)), exits.Training(hidden=8, epochs=30, batch=20, rate=0.02))
    assert {k: [tuple(m.shape) for m in pair] for k, pair in gates.items()} == {k: [(8, 6), (2, 8)] for k in (1, 2)}
    found = exits.judge(gates, seen.rows(torch.arange(200, 300)))
    assert min(found["accuracy"]) > 0.9 and found["stay"][2] == 0.0
    again = exits.train(seen.rows(torch.arange(200)), exits.Training(hidden=8, epochs=30, batch=20, rate=0.02))
    assert torch.equal(gates[1][0], again[1][0]) and gates[1][0].is_leaf


def test_the_judge_counts():
    """Four samples and two gates that leave where channel 0, or 1, is positive."""
    shown = torch.tensor([[[1.0, 0], [0, 0]], [[-1, 0], [0, 1]], [[1, 0], [0, 1]], [[-1, 0], [0, -1]]])
    leave = torch.tensor([[True, True], [False, False], [False, True], [True, False]])
    out = torch.tensor([[0.0], [1.0]])
    gates = {1: (torch.tensor([[1.0, 0]]), out), 2: (torch.tensor([[0, 1.0]]), out)}
    found = exits.judge(gates, exits.Table(shown, leave))
    assert found["stay"] == [1.0, 0.5, 0.25]
    assert found["may_leave"] == [0.5, 0.5] and found["accuracy"] == [0.5, 0.5]
    assert found["harmful"] == [0.25, 0.25], "sample 2 leaves at layer 1 and no more at layer 2"


def test_every_fifth_picture_is_kept_back():
    asked = samples.read("reference", 66)
    back = kept_back(asked, "reference")
    pictures = list(dict.fromkeys(s.image for s in asked))
    assert {s.image for s, b in zip(asked, back, strict=True) if b} == {pictures[4], pictures[9]}
    assert int(back.sum()) == 12


def test_divergence_and_the_choice():
    half, third = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.25, 0.75]).log()
    want = 0.5 * torch.tensor(2.0).log() + 0.5 * torch.tensor(2 / 3).log()
    assert vtw.divergence(half, third + 7).item() == pytest.approx(want.item())
    assert vtw.divergence(third, half).item() != pytest.approx(want.item()), "of the withdrawn from the full"
    found = [0.001, 0.9, 0.003, 0.5, 0.0]
    assert vtw.choose(found, 1, 0.003) == 1 and vtw.choose(found, 2, 0.003) == 3 and vtw.choose(found, 4, 0.003) == 5
    assert vtw.choose(found[1:2] * 2 + [0.5], 2, 0.003) is None


def test_calibrate_vtw(capsys):
    assert main(["calibrate", "vtw", "tiny-llava", "--limit", "3", "--tolerance", "9", "--first", "2", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["layer"] == 2 and out["pipeline"] == "vtw:layer=2" and out["questions"] == 3
    model, processor = reference.load()
    kl = []
    for sample in samples.read("reference", 3):
        prompt = samples.prepare(model, processor, sample)
        with torch.no_grad():
            full = model(**prompt).logits[0, -1].log_softmax(-1)
            with vtoken.wrapped(model, "vtw:layer=3"):
                now = model(**prompt).logits[0, -1].log_softmax(-1)
        kl.append(torch.nn.functional.kl_div(full, now, log_target=True, reduction="sum").item())
    assert out["divergence"]["3"] == pytest.approx(sum(kl) / 3, rel=1e-3)
    assert main(["calibrate", "vtw", "tiny-llava", "--limit", "3", "--tolerance", "9"]) == 0
    assert "vtw:layer=1 on 3 questions of reference" in capsys.readouterr().out
    # The reference model reads its images to the end: that is what was found, and no error.
    words = ["calibrate", "vtw", "tiny-llava", "--limit", "2", "--tolerance", "0"]
    assert main([*words, "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["layer"] is None and out["pipeline"] == "none" and not config.load("none").stages
    assert main(words) == 0
    assert "no layer from 1 on keeps the divergence within 0.0, the lowest is" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["calibrate", "vtw", "tiny-llava", "--limit", "1", "--tolerance", "-1"], "at least 0"),
        (["calibrate", "vtw", "tiny-llava", "--first", "4"], "between 1 and 3"),
        (["calibrate", "vtw", "tiny-llava", "--data", "nowhere"], "no data 'nowhere'"),
        (["calibrate", "vtw", "tiny-llava", "--limit", "0"], "at least 1"),
        (["train-exit", "tiny-llava", "--data", "reference", "--limit", "24", "-o", "x"], "at least 5 pictures"),
        (["train-exit", "tiny-llava", "--data", "reference", "-o", "no/x"], "no folder 'no'"),
        (["train-exit", "tiny-llava", "--data", "reference", "--rate", "0", "-o", "x"], "--rate must be above 0"),
    ],
)
def test_bad_arguments_are_named(words, message, capsys):
    assert main(words) == 2
    assert message in capsys.readouterr().err


def test_train_exit_writes_gates_that_wrap(tmp_path, capsys):
    file = tmp_path / "gates.safetensors"
    words = ["train-exit", "tiny-llava", "--data", "reference", "--limit", "30", "--hidden", "4", "--epochs", "2"]
    assert main([*words, "-o", str(file), "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["questions"] == 24 and out["kept_back"] == 6 and out["file"] == str(file)
    head = header(str(file))
    assert head[:3] == (4, 128, 4) and list(head.stay) == out["stay"] and len(out["accuracy"]) == 3
    model, processor = reference.load()
    with vtoken.wrapped(model, f"dyvte:gates={file}"):
        reference.answers(model, processor, reference.questions(2))
        assert vtoken.trace(model).layers[0] == [576, 576]


def test_data_of_ones_own(tmp_path):
    picture = reference.questions(1)[0].image
    file = tmp_path / "mine.jsonl"
    row = {"image": str(picture), "question": "what?"}
    file.write_text(json.dumps(row) + "\n\n" + json.dumps({**row, "answer": 5}) + "\n")
    assert samples.read(str(file)) == [samples.Sample(picture, "what?"), samples.Sample(picture, "what?", "5")]
    assert samples.read(str(picture.parent), 2) == samples.read("reference", 2)
    for line, message in (
        ("[1]", "line 1"),
        ('{"image": "x"}', "line 1"),
        (json.dumps({**row, "image": "x"}), "no pic"),
    ):
        file.write_text(line)
        with pytest.raises(ConfigError, match=message):
            samples.read(str(file))
    file.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        samples.read(str(file))
