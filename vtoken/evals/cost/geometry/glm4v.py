"""GLM-4.1V: gated MLPs as wide as the tower's output, patches joined by a convolution, and timestamps after the frames
of a video."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry._packed import DEFAULT_SIZE, packed, packed_inputs
from vtoken.evals.cost.geometry._padded import pair
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.stages import Grid

# Fewest and most pixels of a whole video by default (`Glm4vVideoProcessor`, which imports torchvision).
VIDEO = {"shortest_edge": 112 * 112, "longest_edge": 28 * 28 * 2 * 30000}


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(frames, rows, columns) of one image or video in patches, rounded as transformers' processors do by default: all
    frames of a video count, and an image as two frames.

    Raises:
        ConfigError: a picture more than 200 times as long as wide.
    """
    from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil, smart_resize

    limits = VIDEO if frames > 1 else Glm4vImageProcessorPil.size
    height, width = pair(image_size or DEFAULT_SIZE)
    try:
        height, width = smart_resize(
            max(frames, vision.temporal_patch_size),
            height,
            width,
            temporal_factor=vision.temporal_patch_size,
            factor=vision.patch_size * vision.spatial_merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
    except ValueError as error:
        raise ConfigError(f"image_size {height}x{width}: {error}") from None
    return math.ceil(frames / vision.temporal_patch_size), height // vision.patch_size, width // vision.patch_size


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    width, out = vision.hidden_size, vision.out_hidden_size
    return packed(
        config,
        pictures.size,
        pictures.frames,
        width=width,
        out=out,
        mlp=3 * width * out,
        parted_frames=True,
        merger=vision.spatial_merge_size**2 * width * out + out**2 + 3 * out * vision.intermediate_size,
        sized=patch_grid,
    )


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return packed_inputs(config, pictures, draw, patch_grid)
