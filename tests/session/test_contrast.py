"""`contrast:`, decoding against the same model under another pipeline, compared with logits of both that are recomputed at
every step."""

from __future__ import annotations

import threading

import modes
import oracle
import pytest
import tiny
import torch
from model_state import changed, state
from modes import LOGITS, ROWS, alone, greedy
from probes import Deep, Ragged
from transformers import LogitsProcessor

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, UnsupportedError

NEW, ALPHA, BETA = 4, 0.8, 0.02
STAGES = [{"uniform": {"keep": 9}}, Deep()]
OTHER = [{"fastervlm": {"keep": 2}}, Ragged()]
families = pytest.mark.parametrize("family", tiny.each("anyres", "mrope", "states", "window"))


def pipeline(alpha=ALPHA, beta=BETA, stages=STAGES):
    inner = config.Contrast(config.load(OTHER), alpha, beta)
    found = config.load(stages)
    return config.Pipeline("contrast", "original", found.stages, contrast=inner)


def forced(model, batch, stages, tokens):
    """[n, B, V] log-probabilities of the model under plain stages while it is made to say `tokens`."""
    p = oracle.prompt(model, batch)
    with vtoken.wrapped(model, stages):
        greedy(model, batch, 1)
        reported = vtoken.trace(model).stages
    return modes.forced(model, p, reported, tokens).log_softmax(-1)


def contrasted(model, batch, tokens):
    """The definition."""
    mine, other = (forced(model, batch, stages, tokens) for stages in (STAGES, OTHER))
    assert (mine - other).abs().amax((0, 2)).max() > 0.1, "they see other things"
    out = (1 + ALPHA) * mine - ALPHA * other
    low = mine.exp() < BETA * mine.exp().amax(-1, keepdim=True)
    assert 0.02 < float(low.float().mean()) < 0.9
    return out.masked_fill(low, -torch.inf).log_softmax(-1)


def close(got, want):
    """Up to words that are on the border of what is out."""
    both = got.isfinite() & want.isfinite()
    assert (got.isfinite() ^ want.isfinite()).float().mean() < 1e-2
    torch.testing.assert_close(got[both], want[both], atol=2e-3, rtol=1e-3)


@families
def test_greedy_answers(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    plain = greedy(model, batch, NEW)
    with vtoken.wrapped(model, pipeline()):
        out = greedy(model, batch, NEW, output_scores=True, **LOGITS)
    said = out.sequences[:, -NEW:]
    close(torch.stack(out.scores).log_softmax(-1), contrasted(model, batch, said))
    assert torch.equal(greedy(model, batch, NEW), plain), "unwrapped"


@families
def test_rows_alone_samples_and_beams(family):
    model = tiny.make(family)
    batch = tiny.build(model, modes.expandable(family), seed=3)
    with vtoken.wrapped(model, pipeline()):
        together = greedy(model, batch, NEW)
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row), NEW)[0, -NEW:], together[row, -NEW:])
        torch.manual_seed(5)
        options = {"do_sample": True, "num_return_sequences": 2, "top_k": 0, "output_scores": True}
        drawn = model.generate(**batch, max_new_tokens=NEW, return_dict_in_generate=True, **options)
        options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
        beams = greedy(model, batch, NEW, output_scores=True, return_dict_in_generate=True, **options)
    for b in range(2):
        want = contrasted(model, batch, drawn.sequences[b::2, -NEW:])
        close(torch.stack(drawn.scores)[:, b::2].log_softmax(-1), want)
        said = beams.sequences[b::2, -NEW:]
        want = contrasted(model, batch, said).gather(2, said.T[..., None])[..., 0].sum(0)
        torch.testing.assert_close(beams.sequences_scores[b::2], want, atol=5e-3, rtol=1e-3)


@families
def test_calls_in_turns(family):
    """Of several threads: what the other model remembers is each call's own."""
    model, said = tiny.make(family), {}
    batches = [tiny.build(model, rows, seed=3) for rows in (ROWS, ROWS[::-1])]
    turns = threading.Barrier(2)

    class Wait(LogitsProcessor):
        def __call__(self, ids, scores):
            turns.wait(60)
            return scores

    def talk(number):
        said[number] = greedy(model, batches[number], NEW, logits_processor=[Wait()])

    with vtoken.wrapped(model, pipeline()):
        want = [greedy(model, batch, NEW) for batch in batches]
        threads = [threading.Thread(target=talk, args=(number,)) for number in range(2)]
        for step in (threading.Thread.start, threading.Thread.join):
            for thread in threads:
                step(thread)
    assert all(torch.equal(said[number], want[number]) for number in range(2))


def test_alpha_0_is_the_pipeline_itself():
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, STAGES):
        want = greedy(model, batch, NEW, output_scores=True, **LOGITS)
    with vtoken.wrapped(model, pipeline(alpha=0.0)):
        got = greedy(model, batch, NEW, output_scores=True, **LOGITS)
    assert torch.equal(torch.stack(got.scores), torch.stack(want.scores))


@pytest.mark.parametrize(
    "default",
    [{"use_cache": False}, {"cache_implementation": "static"}, {"num_beams": 3}, {"max_length": 3}],
    ids=lambda default: next(iter(default)),
)
def test_how_the_model_generates_by_default_is_not_how_the_other_is_asked(default):
    model, options = tiny.llava(), {"num_beams": 1, "output_scores": True, **LOGITS}
    batch = tiny.build(model, ROWS, seed=3)
    plain = pipeline(stages=STAGES[:1])  # without a cache, deep stages look from every new token
    with vtoken.wrapped(model, plain):
        want = greedy(model, batch, NEW, **options)
    model.generation_config.update(**default)
    with vtoken.wrapped(model, plain):
        got = greedy(model, batch, NEW, **options)
    assert torch.equal(got.sequences, want.sequences)
    close(torch.stack(got.scores), torch.stack(want.scores))


def test_the_model_itself_against_fewer_tokens():
    """Without stages of its own, processors of the caller behind it, and everything taken back afterwards."""
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    plain, seen = greedy(model, batch, NEW), []
    before = state(model)

    def look(ids, scores):
        seen.append(scores)
        return scores

    vtoken.wrap(model, {"stages": [], "contrast": {"stages": [{"random": {"keep": 1}}], "alpha": 2.0, "beta": 0.5}})
    out = model.generate(
        batch["input_ids"],
        max_new_tokens=NEW,
        do_sample=False,
        logits_processor=[look],
        **{k: v for k, v in batch.items() if k != "input_ids"},
        **LOGITS,
    )
    assert len(seen) == NEW and all(bool(s.isinf().any()) for s in seen)
    assert torch.equal(seen[0].argmax(-1), out.sequences[:, -NEW])
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits[:, -1], out.logits[0], atol=1e-4, rtol=1e-4)
    vtoken.unwrap(model)
    assert not changed(before, state(model)) and torch.equal(greedy(model, batch, NEW), plain)


def test_what_the_other_cannot_follow_is_refused():
    model = tiny.llava()
    batch = tiny.build(model, ROWS[:1], seed=3)
    with vtoken.wrapped(model, pipeline()):
        out = greedy(model, batch, 2, return_dict_in_generate=True)
        calls = [
            ({"prompt_lookup_num_tokens": 3}, "several at once"),
            ({"assistant_model": tiny.llava()}, "several at once"),
            ({"past_key_values": out.past_key_values}, "earlier turn"),
            ({"input_ids": None, "inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
            ({"inputs_embeds": torch.zeros(1, 4, 32)}, "inputs_embeds"),
        ]
        for more, says in calls:
            with pytest.raises(UnsupportedError, match=says):
                greedy(model, {**batch, **more}, 2)
        assert torch.equal(greedy(model, batch, 2), out.sequences), "usable after that"
    with pytest.raises(UnsupportedError, match=r"contrast: .*this model allows 1 to 3"):
        vtoken.wrap(model, {"stages": [], "contrast": {"stages": [{"fastv": {"keep": 5, "layer": 9}}]}})
    vtoken.unwrap(vtoken.wrap(model, "none"))


def test_a_failing_contrast_leaves_the_model_usable(monkeypatch):
    model = tiny.llava()
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, pipeline()):
        want = greedy(model, batch, NEW)
        monkeypatch.setattr(Ragged, "select", lambda self, tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            greedy(model, batch, NEW)
        monkeypatch.undo()
        assert torch.equal(greedy(model, batch, NEW), want)


def test_in_a_pipeline_file(tmp_path):
    file = tmp_path / "vtoken.yaml"
    file.write_text("stages: [uniform: {keep: 9}]\ncontrast:\n  alpha: 2\n  stages: [random: {keep: 1}]\n")
    found = config.load(file)
    contrast = found.contrast
    assert (contrast.alpha, contrast.beta) == (2, 0.1) and contrast.pipeline.stages[0].name == "random"
    again = tmp_path / "again.yaml"
    again.write_text(config.dump(found))
    assert config.load(again).contrast.pipeline.stages == contrast.pipeline.stages and config.load(
        again
    ) == config.load(again)
    model = vtoken.wrap(tiny.llava(), found)
    assert config.load(vtoken.save(model, tmp_path / "saved")).contrast.alpha == 2


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stages: []\ncontrast: 7\n", "vtoken.yaml:2: contrast is a mapping"),
        (
            "stages: []\ncontrast: {alpha: -1, stages: []}\n",
            "vtoken.yaml:2: contrast: alpha must be a number >= 0, not -1",
        ),
        ("stages: []\ncontrast: {beta: 2, stages: []}\n", "beta must be a number >= 0 and <= 1, not 2"),
        ("stages: []\ncontrast: {alpha: true, stages: []}\n", "not True"),
        ("stages: []\ncontrast: {alpha: 1}\n", "vtoken.yaml:2: contrast: stages must be a list"),
        ("stages: []\ncontrast: {anyres: 2x2, stages: []}\n", "write anyres: 2x2 beside contrast"),
        ("stages: []\ncontrast: {alpa: 1, stages: []}\n", "unknown key 'alpa', did you mean 'alpha'"),
        (
            "stages: []\ncontrast:\n  stages:\n    - uniform: {kep: 3}\n",
            "vtoken.yaml:4: contrast: stage 'uniform'.*kep",
        ),
        ("stages: []\ncontrast: {stages: [], contrast: {stages: []}}\n", "neither draft nor contrast"),
    ],
)
def test_contrasts_that_do_not_read(text, says, tmp_path):
    file = tmp_path / "vtoken.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=says):
        config.load(file)


def test_a_draft_beside_a_contrast_is_refused_when_it_is_made():
    model = tiny.llava()
    vtoken.wrap(model, pipeline())
    try:
        with pytest.raises(UnsupportedError, match=r"has a contrast, .* leave one of the two out"):
            vtoken.draft(model, None, "uniform:25%")
        assert vtoken.pipeline(model).contrast is not None, "the model stays as it was wrapped"
    finally:
        vtoken.unwrap(model)
    vtoken.unwrap(vtoken.draft(model, None, "uniform:25%"))
