"""LLaVA-1.5: every image is one crop of the tower's own size; with a Pixtral tower it keeps its own."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry import _pixtral, from_config
from vtoken.evals.cost.geometry._padded import padded
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    if config.vision_config.model_type == "pixtral":
        width, out = config.vision_config.hidden_size, config.text_config.hidden_size
        return _pixtral.pixtral(config, pictures, merge=1, projector=width * out + out**2)
    from_config.check_still(config, pictures)
    return padded(config, (from_config.crop(config),))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    kind = _pixtral if shape.tower.packed else from_config
    return kind.inputs(config, shape, pictures, draw)
