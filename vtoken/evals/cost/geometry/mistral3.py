"""Mistral Small 3: Pixtral, and a projector that joins 2 x 2 patches to a token."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry._pixtral import inputs, pixtral
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    merge, width, out = config.spatial_merge_size, config.vision_config.hidden_size, config.text_config.hidden_size
    return pixtral(config, pictures, merge, projector=merge**2 * width**2 + width * out + out**2)
