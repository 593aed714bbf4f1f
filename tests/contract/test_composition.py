"""Stages of several sites in one pipeline, in pairs and as one deep chain, on every family."""

from __future__ import annotations

from itertools import combinations, pairwise
from typing import Any

import pytest
import tiny
import torch
from against_oracle import compare
from batches import rows_for
from modes import alone, families, greedy, whole
from usual import CACHE, SPARSE

import vtoken
from vtoken.hooks.state.trace import Trace

# One stage a site, merging and choosing, and an exit behind them; each leaves something for the next.
ENCODER = {"flowcut": {"keep": 12}}
TOKENS = {"prumerge": {"keep": 9}}
DECODER = {"fastv": {"keep": 5, "layer": 1}}
LATER = {"dart": {"keep": 3, "layer": 2}}
EXIT = {"vtw": {"layer": 3}}
CHAIN = [ENCODER, TOKENS, DECODER, LATER, EXIT]
PAIRS = list(combinations(CHAIN, 2))


def names(stages: Any) -> str:
    return "+".join(name for stage in stages for name in stage)


def adds_up(trace: Trace, layers: int) -> None:
    """What one stage leaves is what the next one gets, and what the layers saw follows from it."""
    choosing = [s for s in trace.stages if s.site in ("encoder", "tokens", "decoder")]
    assert choosing[0].tokens_in == trace.visual_tokens
    assert all(before.tokens_out == after.tokens_in for before, after in pairwise(choosing))
    left = trace.visual_tokens
    for layer in range(layers):
        left = next((s.tokens_out for s in reversed(choosing) if s.site != "decoder" or (s.layer or 0) <= layer), left)
        assert trace.layers[layer] == left, f"layer {layer}"


@families
@pytest.mark.parametrize("stages", PAIRS, ids=names)
def test_pairs_equal_a_recomputation(family: str, stages: tuple[Any, ...]) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    trace = compare(model, batch, {"stages": list(stages)}, new=3, weighted=True)
    adds_up(trace, 4)
    assert {s.name for s in trace.stages} == {name for stage in stages for name in stage}


@families
def test_the_deep_chain_equals_a_recomputation(family: str) -> None:
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    trace = compare(model, batch, {"stages": CHAIN}, new=4, weighted=True)
    adds_up(trace, 4)
    assert [sum(layer) for layer in trace.layers] == sorted([sum(layer) for layer in trace.layers], reverse=True)
    assert not sum(trace.layers[3])


@whole
def test_sparse_attention_and_a_small_cache_close_the_chain(family: str) -> None:
    """All six sites but `frames`: a ragged batch says what its rows say alone."""
    model = tiny.make(family)
    rows = [[3, "img", 25], [1, "img", 2, "img", 7], [4]]
    batch = tiny.build(model, rows, seed=3)
    options: dict[str, Any] = {"n": 4, "return_dict_in_generate": True, "output_logits": True}
    with vtoken.wrapped(model, {"stages": [ENCODER, TOKENS, DECODER, SPARSE, CACHE]}):
        together = torch.stack(greedy(model, batch, **options).logits, 1)
        trace = vtoken.trace(model)
        adds_up(trace, 4)
        assert {s.site for s in trace.stages} == {"encoder", "tokens", "decoder", "attention", "cache"}
        assert any(s.densities for s in trace.stages if s.site == "attention"), "it did not stand aside"
        for row in range(len(rows)):
            single = torch.stack(greedy(model, alone(model, batch, row), **options).logits, 1)
            torch.testing.assert_close(together[row : row + 1], single, atol=2e-4, rtol=1e-4)
