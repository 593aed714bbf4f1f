"""Qwen2.5-VL: most blocks attend in windows, and the tower's sequence is stored window by window."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.adapters._packed import Packed


class Qwen25VL(Packed):
    """`Qwen2_5_VLForConditionalGeneration`."""

    model_type = "qwen2_5_vl"

    def full_attention(self) -> tuple[int, ...]:
        return tuple(sorted(self.tower.fullatt_block_indexes))

    def order(self, grid: Tensor, arguments: dict[str, Any]) -> Tensor:
        tower = self.tower
        try:
            from transformers.vision_utils import get_vision_window_index
        except ImportError:  # up to 5.16
            return tower.get_window_index(grid)[0]
        # A copy: a window order that the caller computed is taken out of it.
        return get_vision_window_index(
            grid, tower.spatial_merge_size, tower.window_size, tower.patch_size, kwargs=dict(arguments)
        )[0]
