"""What methods that decide pool by pool share. A pool is an image, or with a budget per frame or crop one of its segments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vtoken.stages import Keep, Pruner, VisualTokens, keep_all


def choose(stage: Pruner, tokens: VisualTokens, pick: Callable[[Tensor, int], Tensor]) -> Keep:
    """Lets `pick(rows, k)` choose k of a pool's packed rows [n] (ascending), in any order. 1 <= k < n: pools that stay whole are not
    asked. A loop over pools."""
    if stage.keep.per is not None and tokens.segment is not None:
        order, held, counts, lengths = stage.per_segment(tokens)
    else:
        counts = lengths = stage.keep.counts(tokens.lengths, tokens.row)
        order, held = torch.arange(len(tokens.x), device=tokens.x.device), tokens.lengths
    if counts == held:
        return keep_all(tokens)
    pools = zip(order.split(list(held)), counts, strict=True)
    kept = [rows if k == len(rows) else pick(rows, k) for rows, k in pools]
    return Keep(torch.cat(kept).sort().values, lengths)


def merged(keep: Keep, home: Tensor, weight: Tensor | None = None) -> Keep:
    """The decision with `home` [ΣN], the packed row that absorbs each dropped token (-1: none does), as `Keep.into`."""
    slot = torch.full_like(home, -1)
    slot[keep.index] = torch.arange(len(keep.index), device=home.device)
    into = torch.where(slot >= 0, slot, torch.where(home >= 0, slot[home.clamp(min=0)], -1))
    return Keep(keep.index, keep.lengths, into, weight)


def top(scores: Tensor, k: int) -> Tensor:
    """[k] positions of the highest scores, best first, ties to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:k]


def rest_of(n: int, taken: Tensor) -> Tensor:
    """[n - len(taken)] positions that are not taken, ascending; without asking the device."""
    free = torch.ones(n, dtype=torch.int8, device=taken.device).index_fill_(0, taken, 0)
    return top(free, n - len(taken))
