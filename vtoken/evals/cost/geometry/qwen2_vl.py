"""Qwen2-VL: every block attends to the whole image, or pair of frames."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry._packed import inputs, packed, patch_grid
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    width, grid = vision.embed_dim, patch_grid(vision, pictures.size, pictures.frames)
    return packed(config, grid, width=width, out=vision.hidden_size, mlp=2 * width * int(width * vision.mlp_ratio))
