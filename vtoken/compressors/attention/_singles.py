"""Lists of single keys with a size that is known in advance, so the host does not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def listed(taken: Tensor, width: int) -> Tensor:
    """[..., C] int32: the ascending positions of the first True entries of [..., N], padded with -1; C = min(width,
    N)."""
    n = taken.shape[-1]
    places = torch.arange(1, min(width, n) + 1, device=taken.device, dtype=torch.int32)
    places = places.expand(*taken.shape[:-1], -1).contiguous()
    found = torch.searchsorted(taken.cumsum(-1, dtype=torch.int32), places, out_int32=True)
    return torch.where(found < n, found, -1)


def fullest(keys: Tensor, most: int) -> Tensor:
    """[..., M] bool: the fullest blocks, given the number of keys [..., M] in each; as few as leave at most `most` keys
    in all others; ties by index."""
    count, order = keys.sort(dim=-1, descending=True, stable=True)
    left = keys.sum(-1, keepdim=True) - count.cumsum(-1) + count
    return torch.zeros_like(keys, dtype=torch.bool).scatter_(-1, order, left > most)
