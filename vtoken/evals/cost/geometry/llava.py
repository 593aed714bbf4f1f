"""LLaVA: every image is resized to the tower's own size, so its size makes no difference."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._padded import crop, crop_pixels, padded, still
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    still(config, pictures.frames)
    return padded(config, (crop(config),))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return {"pixel_values": draw(pictures.count, *crop_pixels(config))}
