"""LLaVA-1.5: every image is one crop of the tower's own size; with a Pixtral tower it keeps its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._padded import chosen_layers, crop, crop_pixels, padded, still
from vtoken.evals.cost.geometry._pixtral import pixtral, pixtral_inputs
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    if _pixtral(config):
        width, out = config.vision_config.hidden_size * len(chosen_layers(config)), config.text_config.hidden_size
        return pixtral(config, pictures, merge=1, projector=width * out + out**2)
    still(config, pictures.frames)
    return padded(config, (crop(config),))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    if _pixtral(config):
        return pixtral_inputs(config, pictures, 1, draw)
    return {"pixel_values": draw(pictures.count, *crop_pixels(config))}


def _pixtral(config: Any) -> bool:
    return bool(config.vision_config.model_type == "pixtral")
