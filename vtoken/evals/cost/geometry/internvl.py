"""InternVL: crops at the tower's own size and, where they are several, a thumbnail after them; 2 x 2 patches are
shuffled into a token before the projector."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry.from_config import (
    check_still,
    check_tower,
    crop,
    inputs,
    model,
    pair,
    vision_tower,
)
from vtoken.evals.cost.geometry.shapes import Geometry, ImageSize, Pictures
from vtoken.hooks.state.run import runs

__all__ = ["cut_alike", "geometry", "inputs"]

MOST = 12  # crops beside the thumbnail, as InternVL's processor is set


def geometry(config: Any, pictures: Pictures) -> Geometry:
    """Raises UnsupportedError for videos, whose frames are pictures here, and for other towers."""
    check_still(config, pictures)
    check_tower(config, "internvl_vision")
    vision, out = config.vision_config, config.text_config.hidden_size
    (_, rows, columns), join = crop(config), round(1 / config.downsample_ratio)
    many = crops(pictures.size or rows * pair(vision.patch_size)[0], pair(vision.image_size)[0])
    tower = vision_tower(config, ((1, rows // join, columns // join),) * many, join**2, extra=1)
    return model(config, tower, (join**2 * vision.hidden_size + out) * out)


def crops(size: ImageSize, side: int) -> int:
    """Of a picture of this size: those of its best canvas of up to `MOST`, and a thumbnail where they are several."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas(pair(size), (side, side), 1, MOST)
    return columns * rows + (columns * rows > 1)


def cut_alike(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) of a picture with as many crops as the first of a prompt has; None without pictures."""
    found = runs(prompt["input_ids"] == config.image_token_id) if "input_ids" in prompt else []
    (_, rows, columns), side = crop(config), pair(config.vision_config.image_size)[0]
    many = found[0] * round(1 / config.downsample_ratio) ** 2 // (rows * columns) if found else 0
    return (side, side * max(1, many - 1)) if many else None
