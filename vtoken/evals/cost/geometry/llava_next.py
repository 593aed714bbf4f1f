"""LLaVA-NeXT: the downscaled image and its crops, a newline after each row. Images are of the tower's own size unless
told otherwise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._padded import anyres, anyres_inputs, still
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    still(config, pictures.frames)
    return anyres(config, pictures.size)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return anyres_inputs(config, shape, pictures, draw)
