"""Qwen3-VL: features of the first two blocks reach the decoder through mergers of their own, and timestamps part the
frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from family import Picture
from tiny_models import VISION_END, VISION_START

from families._qwen import MROPE, Qwen


class Tiny(Qwen):
    classes = "Qwen3VL"
    leading = True
    other, odd = (1, 4, 4), (1, 6, 4)
    deepstack = 2
    checkpoints = {
        "Qwen/Qwen3-VL-2B-Instruct": 2128,
        "Qwen/Qwen3-VL-4B-Instruct": 4438,
        "Qwen/Qwen3-VL-8B-Instruct": 8767,
    }

    def tower(self) -> dict[str, Any]:
        return {
            "out_hidden_size": 32,
            "intermediate_size": 64,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": list(range(self.deepstack)),
        }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        rope = {**MROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True}
        return super().fields({"head_dim": 8, "rope_parameters": rope, **text})

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        if picture.kind == "image":
            return super().placeholders(picture, words)
        run, frames = super().placeholders(picture, words)[1:-1], picture.spec[0]
        ids: list[int] = []
        for _ in range(frames):
            # Two words stand for the timestamp.
            ids += [*words(2), VISION_START, *run[: len(run) // frames], VISION_END]
        return ids
