"""What a config says about shapes: depths, widths and tokens. One function per family."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.padded import llava, llava_next, llava_onevision
from vtoken.evals.cost.geometry.qwen import qwen
from vtoken.evals.cost.geometry.shapes import Geometry
from vtoken.evals.shared.options import ImageSize

__all__ = ["FAMILIES", "Geometry", "geometry"]

FAMILIES: dict[str, Callable[[Any, ImageSize | None, int, int], Geometry]] = {
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "qwen2_vl": qwen,
    "qwen2_5_vl": qwen,
    "qwen3_vl": qwen,
}


def geometry(
    config: Any, image_size: ImageSize | None = None, images: int = 1, frames: int = 1, anyres: str = "model"
) -> Geometry:
    """The shapes of a model from its transformers config.

    Args:
        image_size: pixels, one number or (height, width). None is the tower's own size; 448 x 448 in the Qwen families. LLaVA-1.5,
            and OneVision for videos and several images, resize everything to the tower's size and ignore it.
        images: per prompt; OneVision cuts crops out of a single image only.
        frames: per image; more than one is a video.
        anyres: the pipeline's policy: crops as the model chooses, or always "2x2".

    Raises:
        UnsupportedError: a model family, tower or decoder whose arithmetic is not known here, or video where there is none.
        ConfigError: a size that the family's processor refuses.
    """
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UnsupportedError(
            f"no FLOPs account for model_type {config.model_type!r}; supported: {', '.join(sorted(FAMILIES))}"
        )
    if anyres == "2x2":
        if not hasattr(config, "image_grid_pinpoints"):
            raise UnsupportedError(
                f"anyres: 2x2: {config.model_type} does not cut pictures into crops; leave the key out"
            )
        side = 2 * config.vision_config.image_size
        config = type(config).from_dict({**config.to_dict(), "image_grid_pinpoints": [[side, side]]})
    return family(config, image_size, images, frames)
