"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT; every frame of a video is one crop, pooled ahead of the projector."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._padded import anyres, inputs, padded
from vtoken.evals.cost.geometry.from_config import crop
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures
from vtoken.stages import size_of

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    if pictures.frames == 1:
        return anyres(config, pictures.size)
    if config.spatial_pool_mode == "conv":
        raise UnsupportedError("no FLOPs account for videos with spatial_pool_mode='conv'; supported: average, max")
    (_, side, _), frames, stride = crop(config), pictures.frames, config.spatial_pool_stride
    raster = (frames, side // stride, side // stride)
    shape = padded(config, (raster,), ((frames, stride**2),))
    (projector,) = shape.projectors
    return replace(shape, projectors=(replace(projector, pooled=size_of((raster,))),))
