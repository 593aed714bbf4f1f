"""A CPU stand-in for flash attention: the same 2D masks, the same tail reading, and it refuses what flash attention
would misread.

Real flash attention takes gaps in `position_ids` for packed sequences when a row is alone in its batch; the stand-in
fails there. Arguments are ordered as a real one's: kvpress, once imported, hands dropout on by its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

NAME = "flash_stand_in"


def attend(
    module: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float = 0.0,
    *,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    positions = kwargs.get("position_ids")
    if len(q) == 1 and q.shape[2] > 1 and positions is not None:
        assert bool((positions.diff() == 1).all()), "gaps in position_ids: flash attention would see packed sequences"
    repeat = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeat, 1).transpose(-1, -2) * scaling
    n, m = q.shape[2], k.shape[2]
    seen = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    if kwargs.get("sliding_window") is not None:
        seen = seen.triu(m - n + 1 - kwargs["sliding_window"])
    scores = scores.masked_fill(~seen, float("-inf"))
    if mask is not None:
        assert mask.ndim == 2 and mask.shape[1] == m, f"mask {tuple(mask.shape)} for {m} keys"
        scores = scores.masked_fill(~mask[:, None, None].bool(), float("-inf"))
    weights = scores.softmax(-1).nan_to_num()
    return (weights @ v.repeat_interleave(repeat, 1)).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, flash_attention_mask)
