"""Qwen2-VL: every block attends to the whole image, or pair of frames."""

from __future__ import annotations

from typing import Any

from families._qwen import Qwen


class Tiny(Qwen):
    classes = "Qwen2VL"
    leading = True
    other, odd = (1, 8, 4), (1, 6, 4)
    checkpoints = {
        "Qwen/Qwen2-VL-2B-Instruct": 2209,
        "Qwen/Qwen2-VL-7B-Instruct": 8291,
    }

    def tower(self) -> dict[str, Any]:
        return {"embed_dim": 32, "mlp_ratio": 2}
