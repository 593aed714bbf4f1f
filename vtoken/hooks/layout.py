"""Rows of different length: left-padded compaction and the gathers that go with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def pack_left(keep: Tensor, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Left-padded compaction of the kept columns.

    Args:
        keep: [B, L] bool.
        width: the largest number of kept columns of a row, if the host knows it.

    Returns:
        index [B, P] into the columns, in order, and valid [B, P]: padding is at the left.
    """
    width = int(keep.sum(1).max()) if width is None else width
    index = torch.argsort(keep.int(), dim=1, stable=True)[:, keep.shape[1] - width :]
    return index, keep.gather(1, index)


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gathers index [B, P] along sequence axis `dim` of x. The batch axis is the one before it: 0 for [B, L, ...], 1 for [3, B, L];
    a batch axis of 1 is expanded."""
    dim %= x.ndim
    batch = 0 if dim == 1 else dim - 1
    index = index.to(x.device)
    if x.shape[batch] != len(index):
        x = x.expand(*[len(index) if d == batch else -1 for d in range(x.ndim)])
    view = [len(index) if d == batch else index.shape[1] if d == dim else 1 for d in range(x.ndim)]
    return x.gather(dim, index.view(view).expand(*[index.shape[1] if d == dim else n for d, n in enumerate(x.shape)]))


def left_padded(rows: Sequence[Tensor]) -> Tensor:
    """[B, Hk, longest, d] of rows [Hk, length, d]."""
    longest = max(row.shape[1] for row in rows)
    return torch.stack([F.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


def few(tokens: int, least: int) -> str:
    """Why a row runs dense."""
    return f"{tokens} visual tokens are fewer than min_visual_tokens {least}"
