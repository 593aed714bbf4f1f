"""LLaVA-OneVision: one image per prompt as in LLaVA-NeXT, the stitched crops downscaled where they are too many; of
several images each is a single crop; a video is its frames, each at the tower's own size, pooled 2 x 2, with one
newline."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vtoken.evals.cost.geometry import _padded
from vtoken.evals.cost.geometry._padded import BILINEAR, anyres, padded
from vtoken.evals.cost.geometry.from_config import crop
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    (_, side, _), frames = crop(config), pictures.frames
    if frames > 1:
        half = math.ceil(side / 2)
        return padded(config, ((frames, half, half),), ((frames, BILINEAR),), (1, frames * half**2))
    if pictures.images > 1:
        return padded(config, ((1, side, side),), newlines=(1, side**2))
    return anyres(config, pictures.size, int(config.vision_aspect_ratio.removeprefix("anyres_max_")))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    found = _padded.inputs(config, shape, pictures, draw)
    if pictures.frames > 1:
        return found
    return {**found, "batch_num_images": torch.full((pictures.rows,), pictures.images)}
