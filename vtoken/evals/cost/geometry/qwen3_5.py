"""Qwen3.5: the tower of Qwen3-VL without DeepStack, timestamps between the frames of a video, and a decoder that mostly
keeps states."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._packed import packed, packed_inputs
from vtoken.evals.cost.geometry._states import delta_rule
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
        parted_frames=True,
        stack=delta_rule(config.text_config),
    )


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return packed_inputs(config, pictures, draw)
