"""What the Qwens and their like share: images at their own resolution, patches in one sequence, 2 x 2 merged at the
end.

Sizes are rounded as transformers' image processor does by default (`Qwen2VLImageProcessor`: 56 x 56 to 28 x 28 x 1280
pixels in all), frames of a video too; checkpoints may set other limits. Without a size an image is 448 x 448.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry._padded import pair
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Layers, Pictures, Projector, Tower
from vtoken.stages import Grid

DEFAULT_SIZE = 448
Sized = Callable[[Any, ImageSize | None, int], Grid]


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(frames, rows, columns) of one image or video in patches: `grid_thw`.

    Raises:
        ConfigError: a picture more than 200 times as long as wide.
    """
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    limits = Qwen2VLImageProcessorPil.size
    height, width = pair(image_size or DEFAULT_SIZE)
    try:
        height, width = smart_resize(
            height,
            width,
            factor=vision.patch_size * vision.spatial_merge_size,
            min_pixels=limits["shortest_edge"],
            max_pixels=limits["longest_edge"],
        )
    except ValueError as error:
        raise ConfigError(f"image_size {height}x{width}: {error}") from None
    return math.ceil(frames / vision.temporal_patch_size), height // vision.patch_size, width // vision.patch_size


def packed(
    config: Any,
    image_size: ImageSize | None,
    frames: int,
    *,
    width: int,
    out: int,
    mlp: int,
    deepstack: Sequence[int] = (),
    full: Sequence[int] | None = None,
    parted_frames: bool = False,
    merger: int | None = None,
    sized: Sized = patch_grid,
    stack: Layers | None = None,
) -> Geometry:
    """The whole model.

    Args:
        width: channels inside the tower; out: after its merger.
        mlp: numbers in the weight matrices of one block's MLP.
        deepstack: blocks whose outputs have mergers of their own.
        full: blocks that attend to the whole image; None: all. The others attend in windows.
        parted_frames: as in Geometry.
        merger: numbers in the matrices that make a token of its patches; None: an MLP of two, as wide as the patches.
        sized: as `patch_grid`, where the processor of a family rounds sizes in its own way.
        stack: the decoder, where it is not of the Llama kind.
    """
    vision, text = config.vision_config, config.text_config
    grid = t, h, w = sized(vision, image_size, frames)
    merge, depth = vision.spatial_merge_size, vision.depth
    raster = (t, h // merge, w // merge)
    full = range(depth) if full is None else sorted(full)

    def blocks(grid: Grid) -> tuple[Mapping[int, int], ...]:
        t, h, w = grid
        windows = windows_of(vision, grid) if len(full) < depth else {}
        return tuple({h * w: t} if layer in full else windows for layer in range(depth))

    if merger is None:
        merger = merge**2 * width * (merge**2 * width + out)
    return Geometry(
        tower=Tower(
            layers=Layers(
                depth,
                width,
                weights=4 * width**2 + mlp,
                heads=vision.num_heads,
                kv_heads=vision.num_heads,
                head_dim=width // vision.num_heads,
                windows=(None,) * depth,
            ),
            crops=(raster,),
            unit=merge**2,
            blocks=blocks(grid),
            resized=blocks,
            extra=0,
            stem=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2 * width,
            head_patch=0,
            head_image=0,
            feature_layers=(depth - 1,),
            attention_layer=max(full),
        ),
        projectors=tuple(Projector(merger, layer) for layer in (depth - 1, *deepstack)),
        parts=(raster,),
        sources=((1, 1),),
        newlines=(0, 0),
        decoder=decoder(text) if stack is None else stack,
        vocabulary=text.vocab_size,
        parted_frames=parted_frames,
    )


def windows_of(vision: Any, grid: Grid) -> Counter[int]:
    """Attention windows of one image: patches -> how many. Those at the right and lower edge hold what is left."""
    t, h, w = grid
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([side] * (n // side) + [n % side] * (n % side > 0) for n in (h, w))
    return Counter(a * b for a in rows for b in columns for _ in range(t))


def packed_inputs(config: Any, asked: Pictures, draw: Draw, sized: Sized = patch_grid) -> dict[str, Tensor]:
    """Patches of all images or videos in one sequence, and their grids [images, 3]."""
    vision = config.vision_config
    grid = t, h, w = sized(vision, asked.size, asked.frames)
    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    kind, suffix = ("video", "_videos") if asked.frames > 1 else ("image", "")
    return {
        f"pixel_values{suffix}": draw(asked.count * t * h * w, numbers),
        f"{kind}_grid_thw": torch.tensor([grid] * asked.count),
    }
