"""VFlowOpt's recycling: which tokens go into the pool, and which pooled token represents its cell."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.stages import Parts, size_of


def recycle(importance: Tensor, cell: Tensor, cells: int, k: int, pool: int | None) -> tuple[Tensor, Tensor]:
    """For one image: [N] whether each token stays, and [N] the token that absorbs it, which may be dropped itself.
    `pool` is the size of the pool; None makes it as large as needed to leave k tokens."""
    n = len(importance)
    order, rank = importance.argsort(descending=True, stable=True).flip(0), torch.arange(n, device=cell.device)
    group = cell[order]
    first = rank.new_full((cells,), n).scatter_reduce(0, group, rank, "amin")
    # Tokens left if the pool takes all ranks below this one: each takes one away, the first of a cell takes none.
    opens = (first[group] == rank).long()
    left = n - rank + opens.cumsum(0) - opens
    pooled = left > k if pool is None else rank < pool
    best = rank.new_full((cells,), -1).scatter_reduce(0, group, torch.where(pooled, rank, -1), "amax")
    alive = ~pooled | (best[group] == rank)
    if pool is None:
        alive &= alive.flip(0).cumsum(0).flip(0) <= k
    back = order.argsort()
    return alive[back], order[torch.where(pooled, best[group], rank)][back]


def cells_of(place: Tensor, parts: Parts, side: float) -> tuple[Tensor, int]:
    """[N] recycling cell of each token, and the number of cells of the image."""
    out, before, cells = torch.zeros_like(place), 0, 0
    for part in parts:
        t, h, w = part
        rows, columns = (int((n - 1) / side) + 1 for n in (h, w))
        p = place - before
        y, x = ((along.double() / side).long() for along in (p // w % h, p % w))
        out = torch.where(p >= 0, (p // (h * w) * rows + y) * columns + x + cells, out)
        before, cells = before + size_of((part,)), cells + t * rows * columns
    return out, cells
