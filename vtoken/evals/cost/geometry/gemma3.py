"""Gemma 3: every image is resized to the tower's own size, so its size makes no difference; squares of patches are
averaged to a token before the projection."""

from __future__ import annotations

import math
from typing import Any

from vtoken.evals.cost.geometry.from_config import check_still, check_tower, crop, inputs, model, vision_tower
from vtoken.evals.cost.geometry.shapes import Geometry, Pictures

__all__ = ["geometry", "inputs"]


def geometry(config: Any, pictures: Pictures) -> Geometry:
    """Raises UnsupportedError for videos and for towers other than SigLIP."""
    check_still(config, pictures)
    check_tower(config, "siglip_vision_model")
    (_, rows, columns), side = crop(config), math.isqrt(config.mm_tokens_per_image)
    tower = vision_tower(config, ((1, side, side),), (rows // side) * (columns // side))
    return model(config, tower, config.vision_config.hidden_size * config.text_config.hidden_size)
