"""Attention that chosen queries of a prompt pay to its tokens, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.cached import CachedLayer

CHUNK = 1 << 24  # scores held at once: 64 MiB of fp32


def received(layer: CachedLayer, queries: int) -> Tensor:
    """[Hk, G, N] fp32: attention that every token receives from the last `queries` tokens, summed over them; G query heads per KV head.

    A query sees what stands before it; no N x N map is held.
    """
    keys, (heads, n, _) = layer.keys.float(), layer.queries.shape
    slots, total = torch.arange(n, device=keys.device), keys.new_zeros(len(keys), heads // len(keys), n)
    step = max(1, CHUNK // (heads * n))
    for start in range(n - queries, n, step):
        rows = slice(start, min(n, start + step))
        part = layer.queries[:, rows].float().unflatten(0, (len(keys), -1))
        scores = torch.einsum("hgqd,hnd->hgqn", part, keys) * layer.scale
        total += scores.masked_fill(slots > slots[rows, None], -torch.inf).softmax(-1).sum(2)
    return total
