"""Rows of a causal attention map."""

from __future__ import annotations

import torch
from torch import Tensor


def last_rows(q: Tensor, k: Tensor, rows: int, scale: float) -> Tensor:
    """[H, rows, N] fp32 attention of the last queries of [H, N, d] over keys [H or 1, N, d], causal."""
    return rows_at(q, k, torch.arange(k.shape[1] - rows, k.shape[1], device=q.device), scale)


def rows_at(q: Tensor, k: Tensor, at: Tensor, scale: float) -> Tensor:
    """[H, R, N] fp32 attention of the queries at these positions [R] of [H, N, d] over keys [H or 1, N, d], causal."""
    scores = (q[:, at].float() @ k.float().transpose(1, 2)) * scale
    ahead = torch.arange(k.shape[1], device=q.device) > at[:, None]
    return scores.masked_fill(ahead, -torch.inf).softmax(-1)
