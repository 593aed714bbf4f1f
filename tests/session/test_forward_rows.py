"""Calling forward as training and scoring do: rows padded on the right, answers behind their prompts told by labels,
outputs in full shape."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import families, greedy
from padded_right import BATCH, NAMES, right, with_positions, wrapped_or_skip
from sparse_probes import Ladder
from usual import stage

import vtoken

PLENTY: dict[str, list] = {
    "encoder": [{"tome": {"r": 0}}],
    "tokens": [{"fastervlm": {"keep": 1000}}],
    "decoder": [{"fastv": {"keep": 1000}}],
    "exit": [{"todre_exit": {"threshold": 1e-9}}],
    "filter": [{"var_filter": {}}],
    "cache": [{"snapkv": {"keep": 1000, "window": 2}}],
    "attention": [Ladder()],
}


def labels_of(batch):
    """Every text token whose predecessor is no image token."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    labels = ids.masked_fill(~mask | (ids == tiny.IMG), -100)
    labels[:, 1:][ids[:, :-1] == tiny.IMG] = -100
    labels[mask.cumsum(1) == 1] = -100
    return labels


@families
@pytest.mark.parametrize("name", PLENTY)
def test_rows_padded_on_the_right_keep_their_places(family, name):
    """Nothing is dropped: logits, hidden states and loss are the stock model's, wherever the padding stands."""
    model = tiny.make(family)
    batch = with_positions(model, right(tiny.build(model, BATCH, seed=3)))
    real, labels = batch["attention_mask"].bool(), labels_of(batch)
    with torch.no_grad():
        want = model(**batch, labels=labels, output_hidden_states=True)
        wrapped_or_skip(model, PLENTY[name])
        got = model(**batch, labels=labels, output_hidden_states=True)
    trace = vtoken.trace(model)
    assert trace.tokens_out == trace.visual_tokens, "nothing was dropped"
    torch.testing.assert_close(got.logits[real], want.logits[real], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.loss, want.loss, atol=1e-4, rtol=1e-4)
    for mine, other in zip(got.hidden_states, want.hidden_states, strict=True):
        assert mine.shape == other.shape
        torch.testing.assert_close(mine[real], other[real], atol=tiny.family(family).float32_error, rtol=1e-4)


@families
@pytest.mark.parametrize("name", NAMES)
def test_labels_mark_the_end_of_the_prompt(family, name):
    """An answer that is scored with labels is no part of the question: tokens kept and log-probabilities are those of
    `generate`, on whatever side the padding stands."""
    model = tiny.make(family)
    # What clears earlier caches refuses answers: tests/hooks/cache/test_clear.py.
    wrapped_or_skip(model, [stage(name, seed=18, retroactive=False)])
    batch, n = tiny.build(model, BATCH, seed=3), 3
    out = greedy(model, batch, n, return_dict_in_generate=True, output_logits=True)
    want, kept = torch.stack(out.logits, 1).log_softmax(-1), vtoken.trace(model).kept
    answer = out.sequences[:, -n:]
    ids = out.sequences
    # Answers of different lengths: row 1 is scored on its first token alone.
    lengths = [n, 1, n]
    mask = torch.cat([batch["attention_mask"], torch.ones_like(answer)], 1)
    mask[1, -2:] = 0
    labels = torch.cat([torch.full_like(batch["input_ids"], -100), answer], 1).masked_fill(mask == 0, -100)
    given = {**batch, "input_ids": ids, "attention_mask": mask}
    given |= tiny.types(model, ids)
    order = torch.argsort(~mask.bool(), dim=1, stable=True)
    moved = with_positions(model, right(given))
    for side, answers in ((with_positions(model, given), labels), (moved, labels.gather(1, order))):
        with torch.no_grad():
            scored = model(**side, labels=answers)
        trace = vtoken.trace(model)
        if any(s.stood_aside and "padded on the right" in s.stood_aside for s in trace.stages):
            continue
        assert [k.tolist() for k in trace.kept] == [k.tolist() for k in kept]
        probabilities = scored.logits.log_softmax(-1)
        for row, length in enumerate(lengths):
            at = (answers[row] != -100).nonzero()[:, 0]
            assert len(at) == length
            got = probabilities[row, at - 1]
            torch.testing.assert_close(got, want[row, :length], atol=3e-4, rtol=1e-4)


@families
@pytest.mark.parametrize("stages", [[{"fastv": {"keep": 1000, "layer": 2}}], [{"fastv": {"keep": 3, "layer": 2}}]])
def test_all_outputs_get_their_shape_back(family, stages):
    """Hidden states and attention maps of a batch with padding in every row, at keep 100 % and below."""
    model = tiny.make(family, "eager")
    batch = tiny.build(model, [[3, "img", 6], [1, "img", 4]], seed=3)
    pad = {"input_ids": tiny.PAD, "attention_mask": 0, tiny.family(model).types: 0}
    batch = {k: torch.nn.functional.pad(v, (2, 0), value=pad[k]) if k in pad else v for k, v in batch.items()}
    options = {"output_hidden_states": True, "output_attentions": True}
    real = batch["attention_mask"].bool()
    both = real[:, :, None] & real[:, None]
    with torch.no_grad():
        want = model(**with_positions(model, batch), **options)
        with vtoken.wrapped(model, stages):
            got = model(**with_positions(model, batch), **options)
            alive = [sum(layer) for layer in vtoken.trace(model).layers]
    for name in ("hidden_states", "attentions"):
        assert [x.shape for x in got[name]] == [x.shape for x in want[name]], name
    for k, (mine, other) in enumerate(zip(got.attentions, want.attentions, strict=True)):
        if alive[k] == alive[0] and k < 3 and alive[-1] == alive[0]:
            same = both[:, None].expand_as(other)
            torch.testing.assert_close(mine[same], other[same], atol=1e-4, rtol=1e-4)
