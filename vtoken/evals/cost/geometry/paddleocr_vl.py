"""PaddleOCR-VL: a SigLIP-like tower over pictures of their own size, whose patches the projector joins 2 x 2."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry import _packed
from vtoken.evals.cost.geometry._packed import packed, resized_grid
from vtoken.evals.cost.geometry.from_config import check_still
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.stages import Grid


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(1, rows, columns) of one image in patches, rounded as transformers' processor does by default.

    Raises:
        ConfigError: a picture more than 200 times as long as wide.
    """
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

    factor = vision.patch_size * vision.spatial_merge_size
    return resized_grid(vision, image_size, frames, partial(smart_resize, factor=factor))


def geometry(config: Any, pictures: Pictures) -> Geometry:
    check_still(config, pictures)
    return packed(config, patch_grid(config.vision_config, pictures.size, 1), out=config.text_config.hidden_size)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """As in Qwen, each patch as [channels, height, width]."""
    found, side = _packed.inputs(config, shape, pictures, draw), config.vision_config.patch_size
    return {**found, "pixel_values": found["pixel_values"].unflatten(1, (-1, side, side))}
