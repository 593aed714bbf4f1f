"""What a config says about shapes: depths, widths and tokens that the account multiplies. One file per family, called
like it.

Such a file defines `geometry(config, pictures)` and `inputs(config, shape, pictures, draw)`: the shapes for one image
or video, and random arguments of the feature function as the family's processor would shape them. What most families
share is in from_config.py and decoder.py; files with an underscore hold what a few share.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures

__all__ = ["Geometry", "ImageSize", "cut_alike", "families", "geometry", "random_inputs"]


def families() -> list[str]:
    """Every `model_type` whose shapes are known."""
    return [name for name in registry.adapters() if (Path(__file__).parent / f"{name}.py").exists()]


def geometry(
    config: Any, image_size: ImageSize | None = None, images: int = 1, frames: int = 1, anyres: str = "model"
) -> Geometry:
    """The shapes of a model from its transformers config.

    Args:
        image_size: pixels, one number or (height, width). None is the tower's own size; 448 x 448 in the Qwen families.
            LLaVA-1.5, and OneVision for videos and several images, resize everything to the tower's size and ignore it.
        images: per prompt; OneVision cuts crops out of a single image only.
        frames: per image; more than one is a video.
        anyres: the pipeline's policy: crops as the model chooses, or always "2x2".

    Raises:
        UnsupportedError: a model family, tower or decoder whose arithmetic is not known here, or video where there is
            none.
        ConfigError: a size that the family's processor refuses.
    """
    family = _of(config)
    if anyres == "2x2":
        if not hasattr(config, "image_grid_pinpoints"):
            raise UnsupportedError(
                f"anyres: 2x2: {config.model_type} does not have crop grids (image_grid_pinpoints); leave the key out"
            )
        side = 2 * config.vision_config.image_size
        config = type(config).from_dict({**config.to_dict(), "image_grid_pinpoints": [[side, side]]})
    shape: Geometry = family.geometry(config, Pictures(1, images, frames, image_size))
    return shape


def random_inputs(
    config: Any, rows: int, images: int, frames: int, size: ImageSize | None, draw: Draw
) -> dict[str, Tensor]:
    """Arguments of the family's feature function for `rows` prompts of `images` pictures (videos where `frames` is
    above 1), on the CPU. Raises as `geometry`."""
    shape = geometry(config, size, images, frames)
    inputs: dict[str, Tensor] = _of(config).inputs(config, shape, Pictures(rows, images, frames, size), draw)
    return inputs


def cut_alike(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) of a picture that has as many crops as those of a prompt, where the family's file says how that
    is seen; else None."""
    found = getattr(_of(config), "cut_alike", None)
    size: tuple[int, int] | None = None if found is None else found(config, prompt)
    return size


def _of(config: Any) -> Any:
    """The file of a config's family."""
    if config.model_type not in families():
        raise UnsupportedError(
            f"no FLOPs account for model_type {config.model_type!r}; supported: {', '.join(families())}"
        )
    return import_module(f"{__name__}.{config.model_type}")
