"""LFM2-VL: pictures of their own size up to 256 tokens; larger ones are cut into equal crops, the whole scaled down
after them. The tower is given every crop padded to 1024 patches.

These are the bounds of the checkpoints' processors: as many tokens, and as many along an edge of a crop, as the tower
has position embeddings. One set to others, or not to cut, gives others.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.from_config import check_still, model, pair, vision_tower
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.stages import Parts

LARGE = 2.0  # times the most tokens: from there on a picture is cut
FEWEST = 4  # the most tokens through the fewest
CROPS = range(2, 11)


def rasters(config: Any, image_size: ImageSize | None) -> Parts:
    """Tokens of every crop of a picture of this size; None is a square of the most tokens."""
    most = config.vision_config.num_patches
    side = math.isqrt(most)
    edge = config.vision_config.patch_size * config.downsample_factor
    height, width = pair(image_size or side * edge)
    whole = (1, *scaled(height, width, edge, most // FEWEST, most))
    rows, columns = (max(1 / config.downsample_factor, round(n / edge)) for n in (height, width))
    if rows * columns <= most * LARGE:
        return (whole,)
    down, across = cut(height, width, side * edge)
    return (*((1, side, side),) * (down * across), whole)


def scaled(height: int, width: int, edge: int, fewest: int, most: int) -> tuple[int, int]:
    """Rows and columns of tokens of a picture that is scaled to be no more and no fewer than that."""
    rows, columns = (max(1, round(n / edge)) for n in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / (most * edge**2))
        return max(1, math.floor(height / shrink / edge)), max(1, math.floor(width / shrink / edge))
    if rows * columns < fewest:
        grow = math.sqrt(fewest * edge**2 / (height * width))
        return math.ceil(height * grow / edge), math.ceil(width * grow / edge)
    return rows, columns


def cut(height: int, width: int, side: int) -> tuple[int, int]:
    """Rows and columns of crops of so many pixels along an edge: of the nearest shape; among equals the largest of
    which the picture fills half."""
    grids = sorted(
        {(r, c) for r in range(1, CROPS[-1] + 1) for c in range(1, CROPS[-1] + 1) if r * c in CROPS},
        key=lambda grid: (grid[0] * grid[1], grid[1]),
    )
    best, off = (1, 1), math.inf
    for rows, columns in grids:
        distance = abs(width / height - columns / rows)
        if distance < off or (distance == off and height * width > 0.5 * side**2 * rows * columns):
            best, off = (rows, columns), distance
    return best


def geometry(config: Any, pictures: Pictures) -> Geometry:
    """Raises UnsupportedError for videos, other towers and decoders."""
    check_still(config, pictures)
    kinds = config.vision_config.model_type, config.text_config.model_type, config.vision_config.vision_use_head
    if kinds != ("siglip2_vision_model", "lfm2", False):
        raise UnsupportedError(
            f"no FLOPs account for lfm2_vl with {kinds[0]!r}, {kinds[1]!r} and vision_use_head={kinds[2]}; supported: "
            "'siglip2_vision_model', 'lfm2' and False"
        )
    vision, unit = config.vision_config, config.downsample_factor**2
    tower = replace(vision_tower(config, rasters(config, pictures.size), unit), padded=vision.num_patches)
    middle = config.projector_hidden_size
    projector = unit * vision.hidden_size * middle + middle * config.text_config.hidden_size
    return replace(model(config, tower, projector), parted_crops=True)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Patches of all crops of all pictures [crops, patches, channels], padded, which of them are real, and rows and
    columns of patches."""
    vision, join = config.vision_config, config.downsample_factor
    grids = torch.tensor([[r * join, c * join] for _, r, c in shape.parts * pictures.count])
    longest = vision.num_patches * join**2
    mask = (torch.arange(longest) < grids.prod(1)[:, None]).int()
    pixels = draw(len(grids), longest, shape.tower.patch) * mask[..., None]
    return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": grids}
