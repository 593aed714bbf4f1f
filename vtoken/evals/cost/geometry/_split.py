"""What Idefics3 and SmolVLM share: a picture is scaled until its longer side is four crops, cut, and seen once more as
a whole; k x k patches become a token in the connector.

Four crops are what the processors of the checkpoints say; one set to another size, or not to cut, gives others.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry.from_config import check_still, crop_pixels, model, pair, vision_tower
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.hooks.state.parted import crops_of

LONGEST = 4  # crops along the longer side


def cuts(vision: Any, image_size: ImageSize | None) -> tuple[int, int]:
    """(rows, columns) of crops of a picture of this size; None is that of one crop."""
    side = vision.image_size
    height, width = pair(image_size or side)
    # As the processor rounds: the shorter side to even pixels, then up to whole crops.
    shorter = int(LONGEST * side / (max(height, width) / min(height, width)))
    lines = max(1, math.ceil((shorter + shorter % 2) / side))
    return (LONGEST, lines) if height > width else (lines, LONGEST)


def geometry(config: Any, pictures: Pictures) -> Geometry:
    check_still(config, pictures)
    vision, unit = config.vision_config, config.scale_factor**2
    rows, columns = cuts(vision, pictures.size)
    side = vision.image_size // vision.patch_size // config.scale_factor
    encoder = vision_tower(config, ((1, side, side),) * (rows * columns + 1), unit)
    projector = unit * vision.hidden_size * config.text_config.hidden_size
    return replace(model(config, encoder, projector), parted_crops=True)


def cut_alike(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) of a picture with as many crops as the first of a prompt has; None without pictures, or where its
    processor cut otherwise than described above."""
    vision, ids = config.vision_config, prompt.get("input_ids")
    each = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    shown = None if ids is None else ids == config.image_token_id
    many = 0 if shown is None else int(shown.sum()) // each
    if shown is None or not many:
        return None
    lines, odd = divmod(crops_of(ids, shown, many, each)[0] - 1, LONGEST)
    return (lines * vision.image_size, LONGEST * vision.image_size) if lines and not odd else None


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all crops of a row one after the other [rows, crops, channels, height, width]."""
    return {"pixel_values": draw(pictures.rows, pictures.images * len(shape.parts), *crop_pixels(config))}
