"""Qwen3-VL: DeepStack mergers read early blocks, and timestamps part the frames of a video."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry._packed import inputs, packed, patch_grid
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    grid = patch_grid(vision, pictures.size, pictures.frames)
    return packed(config, grid, deepstack=vision.deepstack_visual_indexes, parted_frames=True)
