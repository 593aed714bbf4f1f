"""GLM-4.6V: as GLM-4.1V."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._glm import glm, glm_inputs
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    return glm(config, pictures)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return glm_inputs(config, pictures, draw)
