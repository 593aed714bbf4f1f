"""Qwen3.5: the tower of Qwen3-VL without DeepStack, timestamps between the frames of a video, and a decoder that mostly
keeps states."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry._packed import inputs, packed, patch_grid
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    return packed(config, patch_grid(config.vision_config, pictures.size, pictures.frames), parted_frames=True)
