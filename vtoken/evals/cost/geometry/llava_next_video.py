"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT; every frame of a video is one crop, pooled ahead of the projector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._padded import anyres, anyres_inputs, crop, padded
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    if pictures.frames == 1:
        return anyres(config, pictures.size)
    if config.spatial_pool_mode == "conv":
        raise UnsupportedError("no FLOPs account for videos with spatial_pool_mode='conv'; supported: average, max")
    (_, side, _), frames, stride = crop(config), pictures.frames, config.spatial_pool_stride
    parts = ((frames, side // stride, side // stride),)
    shape = padded(config, parts, ((frames, stride**2),))
    pooled = frames * (side // stride) ** 2
    return replace(shape, projectors=tuple(replace(each, pooled=pooled) for each in shape.projectors))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    found = anyres_inputs(config, shape, pictures, draw)
    return found if pictures.frames == 1 else {"pixel_values_videos": found["pixel_values"]}
