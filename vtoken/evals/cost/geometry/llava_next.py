"""LLaVA-NeXT: the downscaled image and its crops, a newline after each row. Without a size an image is a square of the
tower's own."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry._padded import anyres, inputs
from vtoken.evals.cost.geometry.from_config import check_still
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    check_still(config, pictures)
    return anyres(config, pictures.size)
