"""What the Qwens and their like share: images at their own resolution, patches in one sequence, 2 x 2 merged at the
end.

Sizes are rounded as transformers' image processor does by default (`Qwen2VLImageProcessor`: 56 x 56 to 28 x 28 x 1280
pixels in all), frames of a video too; checkpoints may set other limits. Without a size an image is 448 x 448.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry.from_config import model, pair, vision_tower
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Pictures, Projector
from vtoken.stages import Grid

DEFAULT_SIZE = 448


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(frames, rows, columns) of one image or video in patches: `grid_thw`.

    Raises:
        ConfigError: a picture more than 200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    least, most = (Qwen2VLImageProcessorPil.size[edge] for edge in ("shortest_edge", "longest_edge"))
    factor = vision.patch_size * vision.spatial_merge_size
    resize = partial(smart_resize, factor=factor, min_pixels=least, max_pixels=most)
    return resized_grid(vision, image_size, frames, resize)


def resized_grid(
    vision: Any, image_size: ImageSize | None, frames: int, resize: Callable[[int, int], tuple[int, int]]
) -> Grid:
    """As `patch_grid`, where `resize` rounds (height, width) as a family's processor does, or raises ValueError."""
    height, width = pair(image_size or DEFAULT_SIZE)
    try:
        height, width = resize(height, width)
    except ValueError as error:
        raise ConfigError(f"image_size {height}x{width}: {error}") from None
    joined = getattr(vision, "temporal_patch_size", 1)
    return math.ceil(frames / joined), height // vision.patch_size, width // vision.patch_size


def packed(
    config: Any,
    grid: Grid,
    *,
    width: int | None = None,
    out: int | None = None,
    mlp: int | None = None,
    merger: int | None = None,
    full: Sequence[int] | None = None,
    deepstack: Sequence[int] = (),
    parted_frames: bool = False,
) -> Geometry:
    """The whole model, for an image or video of this `grid` in patches.

    Args:
        width, mlp: as `vision_tower` takes them.
        out: channels after the merger; None: out_hidden_size.
        merger: numbers in the matrices that make a token of its patches; None: an MLP of two, as wide as the patches.
        full: blocks that attend to the whole image; None: all. The others attend in windows.
        deepstack: blocks whose outputs have mergers of their own.
        parted_frames: as in Geometry.
    """
    vision, merge = config.vision_config, config.vision_config.spatial_merge_size
    frames, rows, columns = grid
    encoder = vision_tower(config, ((frames, rows // merge, columns // merge),), merge**2, width=width, mlp=mlp)
    depth = encoder.layers.depth
    full = range(depth) if full is None else full

    def blocks(grid: Grid) -> tuple[Mapping[int, int], ...]:
        frames, rows, columns = grid
        windows = windows_of(vision, grid) if len(full) < depth else {}
        return tuple({rows * columns: frames} if layer in full else windows for layer in range(depth))

    if merger is None:
        joined = merge**2 * encoder.layers.width
        merger = joined * (joined + (vision.out_hidden_size if out is None else out))
    encoder = replace(encoder, blocks=blocks(grid), resized=blocks, attention_layer=max(full))
    shape = model(config, encoder, merger)
    deeper = (Projector(merger, layer) for layer in deepstack)
    return replace(shape, projectors=(*shape.projectors, *deeper), parted_frames=parted_frames)


def windows_of(vision: Any, grid: Grid) -> Counter[int]:
    """Attention windows of one image: patches -> how many. Those at the right and lower edge hold what is left."""
    t, h, w = grid
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([side] * (n // side) + [n % side] * (n % side > 0) for n in (h, w))
    return Counter(a * b for a in rows for b in columns for _ in range(t))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Patches of all images or videos in one sequence [patches, numbers], and their grids [images, 3]."""
    tower, (frames, rows, columns) = shape.tower, shape.parts[0]
    side = math.isqrt(tower.unit)
    kind, suffix = ("video", "_videos") if pictures.frames > 1 else ("image", "")
    return {
        f"pixel_values{suffix}": draw(pictures.count * tower.patches, tower.patch),
        f"{kind}_grid_thw": torch.tensor([(frames, rows * side, columns * side)] * pictures.count),
    }
