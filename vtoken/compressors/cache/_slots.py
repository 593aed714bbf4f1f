"""Chooses which slots of a layer stay, from scores of its tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.stages.cache import CachedLayer, KeepSlots


def best(scores: Tensor, k: int) -> Tensor:
    """[Hk, k] indices of the k highest of [Hk, M] scores, ascending; ties go to the lower index."""
    return scores.argsort(dim=-1, descending=True, stable=True)[:, :k].sort(-1).values


def hold_text(layer: CachedLayer, scores: Tensor, counts: Sequence[int]) -> KeepSlots:
    """Keeps all text and, per head, the `counts` visual tokens of each image with the highest scores [Hk, N]."""
    stay = scores.shape[1] - sum(layer.lengths) + sum(counts)
    if len(counts) == 1:
        (slots,) = layer.images
        first = torch.full_like(scores, torch.inf)
        first[:, slots] = scores[:, slots]
        return KeepSlots(best(first, stay), tuple(counts))
    alive = torch.ones_like(scores, dtype=torch.bool)
    for slots, k in zip(layer.images, counts, strict=True):
        alive[:, slots] = False
        alive.scatter_(1, slots[best(scores[:, slots], k)], True)
    return KeepSlots(ascending(alive, stay), tuple(counts))


def ascending(alive: Tensor, count: int) -> Tensor:
    """[Hk, count] ascending positions of the True entries of alive [Hk, N], which has `count` in every row."""
    return alive.byte().argsort(dim=-1, descending=True, stable=True)[:, :count]
