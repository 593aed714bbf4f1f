"""Qwen2.5-VL: gated MLPs, and most blocks attend in windows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.evals.cost.geometry import _packed
from vtoken.evals.cost.geometry._packed import packed, patch_grid
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    grid, mlp = patch_grid(vision, pictures.size, pictures.frames), 3 * vision.hidden_size * vision.intermediate_size
    return packed(config, grid, mlp=mlp, full=vision.fullatt_block_indexes)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    found = _packed.inputs(config, shape, pictures, draw)
    return found if pictures.frames == 1 else {**found, "second_per_grid_ts": torch.ones(pictures.count)}
