"""Mergers with virtual unmerging behind them, held against its definition."""

from __future__ import annotations

from typing import ClassVar

import naive_unmerge
import oracle
import pytest
import torch
from against_oracle import encode, merge
from modes import LOGITS, greedy
from probes import Inside, InsideMerge

import vtoken
from vtoken.stages import Compressor, Keep, Site, VisualTokens

NEW = 4
caches = pytest.mark.parametrize("cache", ["expanded", "merged"])


class Mingled(Compressor):
    """Keeps every third token from the second on; the others are spread over the kept ones in turns, every fifth is
    dropped. Groups lie across one another and seldom begin with the token that stays. No paper."""

    site: ClassVar[Site] = "tokens"

    def select(self, tokens: VisualTokens) -> Keep:
        index, into, start, slots = [], [], 0, 0
        for n in tokens.lengths:
            raster_index = torch.arange(n)
            kept = raster_index[1::3] if n > 1 else raster_index
            home = (raster_index * 7 + 1) % max(1, len(kept)) + slots
            home[raster_index % 5 == 4] = -1
            home[kept] = torch.arange(len(kept)) + slots
            index.append(kept + start)
            into.append(home)
            start, slots = start + n, slots + len(kept)
        return Keep(torch.cat(index), tuple(map(len, index)), torch.cat(into))


MERGERS = {
    "pool": [{"pool": {"size": 2}}],
    "mingled": [Mingled()],
    "pruned, mingled, pruned": [{"random": {"keep": "70%"}}, Mingled(), {"random": {"keep": "60%"}}],
    "merged inside": [InsideMerge(at=(1,))],
    "everywhere": [Inside(at=(0,)), {"random": {"keep": "90%"}}, Mingled()],
}


def unmerging(merger, cache="expanded"):
    return [*MERGERS[merger], {"vtu": {"cache": cache}}]


def compare(model, batch, stages, policy="keep_if_row_has_token", new=NEW, given=False):
    """Holds wrapped generation against the definition; returns the trace. With `given` what merged tokens became is
    taken from what enters the decoder (the methods' own tests hold it), else it is the mean of the members."""
    p, entered = oracle.prompt(model, batch), {}
    with vtoken.wrapped(model, {"stages": stages, "newline": policy}):
        hook = model.get_decoder().register_forward_pre_hook(
            lambda m, a, k: entered.update(k if not entered else {}), with_kwargs=True
        )
        out, trace = greedy(model, batch, new, **LOGITS), vtoken.trace(model)
        hook.remove()
        early = [s for s in trace.stages if s.site == "encoder"]
        if early:
            encode(model, batch, p, early)
    if given:
        for row, stay in enumerate(oracle.keep_mask(p, trace.kept, newlines=policy) & p.mask):
            p.embeds[row, stay] = entered["inputs_embeds"][row, -int(stay.sum()) :]
        for d, features in zip(p.deep, entered.get("deepstack_visual_embeds") or [], strict=True):
            d[oracle.keep_mask(p, trace.kept) & p.visual] = features
    else:
        merge(p, trace)
    tokens, logits = naive_unmerge.generate(model, p, naive_unmerge.owners(p, trace, policy), new)
    torch.testing.assert_close(torch.stack(out.logits), logits, atol=2e-4, rtol=1e-4)
    assert torch.equal(out.sequences[:, -new:], tokens)
    return trace
