"""Wrapped generate equals a full recomputation over the kept tokens, for both position policies and every site."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from plain_runs import BATCHES, NEW, compare, run
from probes import Deep, Ragged

import vtoken

PIPELINES = {
    "fastervlm": [{"fastervlm": {"keep": 5}}],
    "ragged": [Ragged()],
    "random then ragged": [{"random": {"keep": "60%"}}, Ragged()],
    "total": [{"fastervlm": {"keep": {"total": 9}}}],
}


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("stages", PIPELINES)
def test_equals_recomputation(stages, rows, attn, positions):
    model = tiny.llava(attn)
    batch = tiny.build(model, BATCHES[rows], seed=3)
    trace = compare(model, batch, {"positions": positions, "stages": PIPELINES[stages]})
    assert sum(trace.tokens_out) < sum(trace.visual_tokens)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("rows", BATCHES)
@pytest.mark.parametrize("stages", [[Deep(at=(2,))], [Deep(at=(1, 3), factor=0.7)], [Ragged(), Deep(at=(2,))]])
def test_decoder_sites_equal_recomputation(stages, rows, attn, positions):
    model = tiny.llava(attn)
    batch = tiny.build(model, BATCHES[rows], seed=3)
    trace = compare(model, batch, {"positions": positions, "stages": stages})
    assert trace.layers[0] != trace.layers[-1]
    assert trace.average_tokens == sum(map(sum, trace.layers)) / 4


@pytest.mark.parametrize("text", ["qwen2", "mistral"])
def test_other_decoders(text):
    model = tiny.llava(text=text, **({"sliding_window": None} if text == "mistral" else {}))
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    compare(model, batch, {"positions": "original", "stages": [Ragged(), Deep()]})


@pytest.mark.parametrize("positions", ["original", "compact"])
def test_merged_tokens_equal_recomputation(positions):
    """Pooling: the mean sits at the place of the cell's first token."""
    model = tiny.llava()
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    p = oracle.prompt(model, batch)
    line, column = p.visual.nonzero(as_tuple=True)
    grids = p.embeds[line, column].view(-1, 2, 2, 2, 2, 32)
    first = torch.tensor([0, 2, 8, 10])
    for i, cells in enumerate(grids.mean((2, 4)).view(-1, 4, 32)):
        at = i * tiny.TOKENS + first
        p.embeds[line[at], column[at]] = cells
    with vtoken.wrapped(model, {"positions": positions, "stages": [{"pool": {"size": 2}}]}):
        out, trace = run(model, batch), vtoken.trace(model)
    keep = oracle.keep_mask(p, [first] * len(grids), tiny.TOKENS)
    tokens, logits = oracle.generate(model, p, keep, NEW, positions == "compact")
    assert torch.equal(out.sequences[:, -NEW:], tokens)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=2e-4, rtol=1e-4)
    rows, columns = torch.arange(16) // 4, torch.arange(16) % 4
    assert trace.stages[0].into[0].tolist() == (rows // 2 * 8 + columns // 2 * 2).tolist()
