"""Qwen2.5-VL: two of the four blocks attend in windows of 2 x 2 tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import VID, VISION_START
from torch import Tensor

from families._qwen import Qwen


class Tiny(Qwen):
    classes = "Qwen2_5_VL"
    leading = True
    other, odd = (1, 8, 12), (1, 6, 8)
    full_attention = (1, 3)
    checkpoints = {
        "Qwen/Qwen2.5-VL-3B-Instruct": 3755,
        "Qwen/Qwen2.5-VL-7B-Instruct": 8292,
        "Qwen/Qwen2.5-VL-32B-Instruct": 33453,
    }

    def tower(self) -> dict[str, Any]:
        return {
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "window_size": 56,
            "fullatt_block_indexes": list(self.full_attention),
            "tokens_per_second": 2,
        }

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        videos = (ids[:, :-1] == VISION_START) & (ids[:, 1:] == VID)
        seconds = {"second_per_grid_ts": torch.ones(int(videos.sum()))} if videos.any() else {}
        return super().beside(ids, images) | seconds
