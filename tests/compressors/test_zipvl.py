"""ZipVL in models: attention among important tokens, the same tokens in the cache, and a cache that is rounded to few bits."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from modes import LOGITS, alone, greedy, whole

import vtoken
from vtoken.compressors._zipvl import quantised
from vtoken.compressors.attention.zipvl import ZipVL
from vtoken.errors import UnsupportedError

FEW = {"tau": 0.9, "recent": 2, "drawn": 4}
ATTENTION, DROP = {"zipvl": {**FEW, "min_len": 0}}, {"zipvl_cache": FEW}
QUANTISE = {"zipvl_cache": {**FEW, "mode": "quantise"}}


def told():
    """The stage, and the positions that it chose, by layer."""
    chosen = {}

    class Telling(ZipVL):
        def reads(self, prompt):
            found = super().reads(prompt)
            chosen.setdefault(prompt.layer, []).append(found.index)
            return found

    return Telling(**FEW, min_len=0), chosen


def restricted(model, batch, chosen):
    """Logits of one unpadded row whose prefill attends only among the chosen tokens, by a mask; rows that read nothing
    give zeros."""
    from transformers import AttentionInterface

    lm, layers = model.get_decoder(), []

    def attend(module, q, k, v, mask, scaling=None, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores, n = q @ k.transpose(-1, -2) * scaling, q.shape[2]
        if n > 1:
            layers.append(module.layer_idx)
            alive = torch.zeros(n, dtype=torch.bool)
            alive[chosen[module.layer_idx][0]] = True
            scores = scores.masked_fill(~(alive[:, None] & alive & torch.ones(n, n).tril().bool()), -torch.inf)
        return (scores.softmax(-1).nan_to_num() @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("known_zipvl", attend)
    before = lm.config._attn_implementation
    lm.config._attn_implementation_internal = "known_zipvl"
    try:
        return greedy(model, batch, **LOGITS)
    finally:
        lm.config._attn_implementation_internal = before
        assert tuple(layers) == tiny.family(model).attending


@whole
def test_attention_among_the_important_ones(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 9]], seed=3)
    stage, chosen = told()
    with vtoken.wrapped(model, [stage]):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
    want = restricted(model, batch, chosen)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)
    (n,) = trace.prompt_tokens
    for entry in trace.stages:
        held = len(chosen[entry.layer][0])
        assert 12 <= held < n and entry.density == [pytest.approx(held * (held + 1) / (n * (n + 1)))]
        assert entry.tokens_in == entry.tokens_out, "all tokens stay alive"
    dense = greedy(model, batch, **LOGITS)
    assert not torch.allclose(torch.stack(dense.logits)[0], torch.stack(got.logits)[0], atol=1e-2)


@whole
def test_everything_is_important_at_tau_1(family):
    """Every token that is attended to at all is, whoever asks."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    want = greedy(model, batch, **LOGITS)
    options = {"tau": 1.0, "recent": 64}
    with vtoken.wrapped(model, [{"zipvl": {**options, "min_len": 0}}, {"zipvl_cache": options}]):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)
    assert trace.stages[0].density == [1.0] * 3 and trace.cached == [trace.prompt_tokens] * len(
        tiny.family(family).attending
    )


@whole
def test_the_cache_holds_the_tokens_that_attended(family):
    model = tiny.make(family)
    batch = tiny.build(model, [[3, "img", 5], [1, "img", 2, "img", 7], [4]], seed=3)
    stage, chosen = told()
    with vtoken.wrapped(model, [{"uniform": {"keep": "80%"}}, stage, DROP]):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
        for row in (0, 1):
            one = greedy(model, alone(model, batch, row), **LOGITS)
            torch.testing.assert_close(
                torch.stack(one.logits)[:, 0], torch.stack(got.logits)[:, row], atol=2e-4, rtol=1e-4
            )
            assert vtoken.trace(model).cached == [[held[row]] for held in trace.cached]
    for held, k in zip(trace.cached, tiny.family(family).attending, strict=True):
        assert held[:2] == [len(index) for index in chosen[k][:2]] and held[2] == 4
    different = len({tuple(held) for held in trace.cached})
    assert different > 1 or tiny.family(family).states, (
        "layers hold different numbers; few have any where others keep a state"
    )


@whole
@pytest.mark.parametrize("rows", ["one", "ragged"])
def test_rounded_caches(family, rows):
    """The first layer is that of the dense model, rounded row by row; what follows the prompt and rows without images are
    exact."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, rows), seed=3)
    dense = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [QUANTISE]):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
        again = greedy(model, alone(model, batch, 0), **LOGITS) if rows == "ragged" else got
    torch.testing.assert_close(got.logits[0], dense.logits[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(got.logits[1][0], dense.logits[1][0], atol=1e-4), "decoding reads rounded keys and values"
    torch.testing.assert_close(torch.stack(again.logits)[:, 0], torch.stack(got.logits)[:, 0], atol=2e-4, rtol=1e-4)
    if rows == "ragged":
        torch.testing.assert_close(torch.stack(got.logits)[:, 2], torch.stack(dense.logits)[:, 2], atol=2e-4, rtol=1e-4)
    first = tiny.family(family).attending[0]
    new, old = (out.past_key_values.layers[first].keys for out in (got, dense))
    assert new.shape == old.shape and trace.cached == [trace.prompt_tokens] * len(tiny.family(family).attending)
    entry = [s for s in trace.stages if s.site == "cache"]
    assert tuple(s.layer for s in entry) == tiny.family(family).attending
    assert all(s.tokens_out == s.tokens_in == [len(kept) for kept in s.kept] for s in entry), "all stay"
    length = trace.prompt_tokens[0]
    column = new[0, 0, -5 - length : -5, 0]
    assert 2 < len(column.unique()) <= 16 + 4 < length or length <= 20


def test_rounding_keeps_its_distance():
    g = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 50, 8, generator=g), torch.randn(2, 50, 8, generator=g) * torch.arange(1, 9)
    index = torch.arange(50)
    errors = []
    for bits in (2, 4, 8):
        found = quantised(keys, values, ((index[::2], bits), (index[1::2], bits)))
        k, v, size = found.keys, found.values, sum(t.nbytes for t in found.tensors())
        errors.append((float((k - keys).abs().max()), float((v - values).abs().max()), size))
        assert (k - keys).abs().max() <= (keys.amax(1) - keys.amin(1)).max() / (2**bits - 1) / 2 + 1e-5
    assert errors[0][0] > 3 * errors[1][0] > 9 * errors[2][0] and errors[0][1] > 3 * errors[1][1]
    assert errors[0][2] < errors[1][2] < errors[2][2]


def test_static_caches_are_refused():
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 9]], seed=3)
    with vtoken.wrapped(model, [QUANTISE]), pytest.raises(UnsupportedError, match="static cache"):
        greedy(model, batch, cache_implementation="static")
