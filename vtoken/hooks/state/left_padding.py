"""Rows of different length: left-padded compaction and the gathers that go with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class SlotLayout:
    """Where the tokens of a forward stand while some layers work on them.

    Attributes:
        index, valid: [B, P] logical column of each slot, and whether it is real.
        logical: [B, S + P] logical position of each slot that is attended to, earlier turns in front; -1 for padding.
        dense: all slots are real.
    """

    index: Tensor
    valid: Tensor
    logical: Tensor
    dense: bool = False

    def restore(self, x: Tensor, length: int) -> Tensor:
        """[B, length, D] of x [B, P, D]: everything at its logical column, zeros elsewhere."""
        if not self.dense:
            x = x.masked_fill(~self.valid.to(x.device)[..., None], 0)
        out = x.new_zeros(len(x), length, x.shape[2])
        return out.scatter(1, self.index.to(x.device)[..., None].expand_as(x), x)

    def restore_map(self, weights: Tensor, length: int, past: int) -> Tensor:
        """[B, H, length, past + length] of attention weights [B, H, P, S + P]."""
        # A layer with a sliding window may hold the last slots alone.
        logical = self.logical[:, -weights.shape[3] :].to(weights.device)
        rows = self.restore(weights.transpose(1, 2).flatten(2), length)
        rows = rows.unflatten(2, weights.shape[1::2]).transpose(1, 2)
        # Padding goes to a column behind the others, which is cut off.
        at = torch.where(logical < 0, past + length, logical)[:, None, None].expand_as(rows)
        return rows.new_zeros(*rows.shape[:3], past + length + 1).scatter(3, at, rows)[..., :-1]


def left_pad(keep: Tensor, width: int | None = None) -> Tensor:
    """Left-padded compaction of the kept columns.

    Args:
        keep: [B, L] bool.
        width: the largest number of kept columns of a row, if the host knows it.

    Returns:
        index [B, P] into the columns, in order, behind padding at the left (columns that are not kept).
    """
    width = int(keep.sum(1).max()) if width is None else width
    return torch.argsort(keep, dim=1, stable=True)[:, keep.shape[1] - width :]


def take(x: Tensor, index: Tensor, dim: int) -> Tensor:
    """Gathers index [B, P] along sequence axis `dim` of x. The batch axis is the one before it: 0 for [B, L, ...], 1
    for [3, B, L]; a batch axis of 1 is expanded."""
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
    if len(rows) == 1:
        return rows[0][None]
    if all(row.shape[1] == longest for row in rows):
        return torch.stack(list(rows))
    return torch.stack([F.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])


def too_few(tokens: int, min_tokens: int) -> str:
    """Why a row runs dense."""
    return f"{tokens} visual tokens are fewer than min_visual_tokens {min_tokens}"
