"""Qwen3-VL: DeepStack mergers read early blocks, and timestamps part the frames of a video."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._packed import packed, packed_inputs
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    return packed(
        config,
        pictures.size,
        pictures.frames,
        width=vision.hidden_size,
        out=vision.out_hidden_size,
        mlp=2 * vision.hidden_size * vision.intermediate_size,
        deepstack=vision.deepstack_visual_indexes,
        parted_frames=True,
    )


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return packed_inputs(config, pictures, draw)
