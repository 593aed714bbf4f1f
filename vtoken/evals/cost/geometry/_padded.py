"""What the LLaVA families share: equal crops through CLIP or SigLIP, a projector on every patch, then packing."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.from_config import (
    check_tower,
    crop,
    crop_pixels,
    image_sizes,
    model,
    pair,
    vision_tower,
)
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.stages import Parts

BILINEAR = 4  # patches that an interpolated token comes from


def anyres(config: Any, image_size: ImageSize | None, most: int | None = None) -> Geometry:
    """The downscaled image, then the crops of the best pinpoint, stitched, unpadded, one newline per row.

    Args:
        image_size: None is the tower's own size.
        most: crops' worth of tokens above which the stitched crops are scaled down.
    """
    size = pair(image_size or config.vision_config.image_size)
    # The family's modelling file defines its anyres arithmetic.
    module: Any = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    whole = _, side, _ = crop(config)
    down, across = module.get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    stitched = torch.empty(1, down * side, across * side, device="meta")
    _, rows, columns = module.unpad_image(stitched, size).shape
    mixed = 1
    if most is not None:
        ratio = math.sqrt(rows * columns / (most * side**2))
        # The thresholds are the model's: see pack_image_features.
        if ratio > 1.1:
            rows, columns, mixed = int(rows // ratio), int(columns // ratio), BILINEAR
    return padded(config, (whole, (1, rows, columns)), ((1, 1), (down * across, mixed)), (rows, columns))


def padded(
    config: Any, parts: Parts, sources: tuple[tuple[int, int], ...] = ((1, 1),), newlines: tuple[int, int] = (0, 0)
) -> Geometry:
    """The whole model; `parts`, `sources` and `newlines` as in Geometry.

    Raises:
        UnsupportedError: another tower than CLIP or SigLIP, or one of whose patches the first is taken for a CLS token.
    """
    vision, out = config.vision_config, config.text_config.hidden_size
    check_tower(config, "clip_vision_model", "siglip_vision_model")
    clip = vision.model_type == "clip_vision_model"
    strategy = getattr(config, "vision_feature_select_strategy", "default" if clip else "full")
    if clip != (strategy == "default"):
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} with a {vision.model_type!r} "
            f"tower {'keeps CLS among the patches' if clip else 'drops the first patch'}; use "
            f"{'default' if clip else 'full'!r}"
        )
    encoder = vision_tower(config, (crop(config),) * sum(crops for crops, _ in sources), extra=int(clip))
    projector = (vision.hidden_size * len(encoder.feature_layers) + out) * out
    return model(config, encoder, projector, parts, sources, newlines)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all crops, or frames [images, crops, channels, height, width], and the sizes of images [images, 2]."""
    pixels = draw(pictures.count, len(shape.tower.crops), *crop_pixels(config))
    if pictures.frames > 1:
        return {"pixel_values_videos": pixels}
    size = pictures.size or config.vision_config.image_size
    return {"pixel_values": pixels, "image_sizes": image_sizes(size, pictures)}
