"""Qwen2-VL: every block attends to the whole image, or pair of frames."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._packed import packed, packed_inputs
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    width = vision.embed_dim
    mlp = 2 * width * int(width * vision.mlp_ratio)
    return packed(config, pictures.size, pictures.frames, width=width, out=vision.hidden_size, mlp=mlp)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return packed_inputs(config, pictures, draw)
