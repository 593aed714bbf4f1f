"""PaddleOCR-VL: a SigLIP-like tower over pictures of their own size, whose patches the projector joins 2 x 2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry._packed import DEFAULT_SIZE, packed, packed_inputs
from vtoken.evals.cost.geometry._padded import pair, still
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures
from vtoken.stages import Grid


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(1, rows, columns) of one image in patches, rounded as transformers' processor does by default.

    Raises:
        ConfigError: a picture more than 200 times as long as wide.
    """
    from transformers.models.paddleocr_vl.image_processing_pil_paddleocr_vl import smart_resize

    try:
        height, width = smart_resize(*pair(image_size or DEFAULT_SIZE), vision.patch_size * vision.spatial_merge_size)
    except ValueError as error:
        raise ConfigError(f"image_size {image_size}: {error}") from None
    return 1, height // vision.patch_size, width // vision.patch_size


def geometry(config: Any, pictures: Pictures) -> Geometry:
    still(config, pictures.frames)
    vision = config.vision_config
    width, out = vision.hidden_size, config.text_config.hidden_size
    mlp = 2 * width * vision.intermediate_size
    return packed(named(config), pictures.size, 1, width=width, out=out, mlp=mlp, sized=patch_grid)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    found = packed_inputs(named(config), pictures, draw, patch_grid)
    vision = config.vision_config
    patch = (vision.num_channels, vision.patch_size, vision.patch_size)
    return {**found, "pixel_values": found["pixel_values"].unflatten(1, patch)}


def named(config: Any) -> Any:
    """The config with the names that Qwen's have."""
    vision = config.vision_config
    tower = SimpleNamespace(
        depth=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        in_channels=vision.num_channels,
        temporal_patch_size=1,
        patch_size=vision.patch_size,
        spatial_merge_size=vision.spatial_merge_size,
    )
    return SimpleNamespace(vision_config=tower, text_config=config.text_config)
