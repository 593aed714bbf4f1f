"""Shared by block-sparse methods: sums and means over blocks, and selections from a ranking."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad


def block_sum(x: Tensor, size: int) -> Tensor:
    """[..., N] -> [..., ceil(N / size)], sums over blocks."""
    return pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)


def block_mean(x: Tensor, size: int) -> Tensor:
    """[H, N, d] -> [H, ceil(N / size), d] fp32, means over blocks; an incomplete last block averages the tokens it
    has."""
    n = x.shape[1]
    sums = pad(x.float(), (0, 0, 0, -n % size)).unflatten(1, (-1, size)).sum(2)
    sizes = (n - torch.arange(0, n, size, device=x.device)).clamp(max=size)
    return sums / sizes[:, None]


def per_head(k: Tensor, heads: int) -> Tensor:
    """[Hk, N, d] -> [H, N, d], every key head repeated for its query heads."""
    return k[:, None].expand(-1, heads // len(k), -1, -1).reshape(heads, *k.shape[1:])


def best(x: Tensor, count: Tensor) -> Tensor:
    """[..., M] bool: the `count` [...] largest of the last axis, ties to the lower index."""
    return ranks(x) < count[..., None]


def ranks(x: Tensor) -> Tensor:
    """[..., M] int64: rank of each entry along the last axis, the largest first, ties by index."""
    order = x.argsort(dim=-1, descending=True, stable=True)
    return torch.empty_like(order).scatter_(-1, order, torch.arange(x.shape[-1], device=x.device).expand_as(order))


def cover(x: Tensor, share: float, drop_crossing: bool = False, always: Tensor | None = None) -> Tensor:
    """[..., M] bool: the largest entries of the last axis until they hold `share` of its sum. The entry that crosses
    the share is included, or excluded with `drop_crossing`; `always` [..., M] is included, and counts first."""
    ranked = x if always is None else x.masked_fill(always, torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    values = x.gather(-1, order)
    mass = values.cumsum(-1)
    total = share * x.sum(-1, keepdim=True)
    taken = mass <= total if drop_crossing else mass - values < total
    taken = torch.zeros_like(taken).scatter_(-1, order, taken)
    return taken if always is None else taken | always
