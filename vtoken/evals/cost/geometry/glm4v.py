"""GLM-4.1V: gated MLPs as wide as the tower's output, patches joined by a convolution, and timestamps after the frames
of a video."""

from __future__ import annotations

from functools import partial
from typing import Any

from vtoken.evals.cost.geometry._packed import inputs, packed, resized_grid
from vtoken.evals.cost.geometry.shapes import Geometry, ImageSize, Pictures
from vtoken.stages import Grid

__all__ = ["geometry", "inputs"]

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
    resize = partial(
        smart_resize,
        max(frames, vision.temporal_patch_size),
        temporal_factor=vision.temporal_patch_size,
        factor=vision.patch_size * vision.spatial_merge_size,
        min_pixels=limits["shortest_edge"],
        max_pixels=limits["longest_edge"],
    )
    return resized_grid(vision, image_size, frames, resize)


def geometry(config: Any, pictures: Pictures) -> Geometry:
    vision = config.vision_config
    width, out = vision.hidden_size, vision.out_hidden_size
    return packed(
        config,
        patch_grid(vision, pictures.size, pictures.frames),
        mlp=3 * width * out,
        merger=vision.spatial_merge_size**2 * width * out + out**2 + 3 * out * vision.intermediate_size,
        parted_frames=True,
    )
