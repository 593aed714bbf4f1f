"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: images at their own resolution, patches in one sequence, 2 x 2 merged at the end.

Sizes are rounded as transformers' image processor does by default (`Qwen2VLImageProcessor`: 56 x 56 to 28 x 28 x 1280 pixels in
all), frames of a video too; checkpoints may set other limits. Without a size an image is 448 x 448.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.padded import pair
from vtoken.evals.cost.geometry.shapes import Geometry, Layers, Projector, Tower
from vtoken.evals.shared.options import ImageSize
from vtoken.stages import Grid

DEFAULT_SIZE = 448


def patch_grid(vision: Any, image_size: ImageSize | None, frames: int) -> Grid:
    """(frames, rows, columns) of one image or video in patches: `grid_thw`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

    limits = Qwen2VLImageProcessorPil.size
    height, width = pair(image_size or DEFAULT_SIZE)
    merged = vision.patch_size * vision.spatial_merge_size
    try:
        height, width = smart_resize(height, width, merged, limits["shortest_edge"], limits["longest_edge"])
    except ValueError as error:
        raise ConfigError(f"image_size {height}x{width}: {error}") from None
    return math.ceil(frames / vision.temporal_patch_size), height // vision.patch_size, width // vision.patch_size


def qwen(config: Any, image_size: ImageSize | None, images: int, frames: int) -> Geometry:
    """All three: they differ in the MLP, in windows (2.5) and in DeepStack mergers (3)."""
    vision, text = config.vision_config, config.text_config
    grid = t, h, w = patch_grid(vision, image_size, frames)
    merge = vision.spatial_merge_size
    raster = (t, h // merge, w // merge)
    depth = vision.depth
    width = vision.embed_dim if config.model_type == "qwen2_vl" else vision.hidden_size
    out = vision.hidden_size if config.model_type == "qwen2_vl" else vision.out_hidden_size
    deepstack = tuple(getattr(vision, "deepstack_visual_indexes", ()))
    full = sorted(getattr(vision, "fullatt_block_indexes", range(depth)))
    windows = windows_of(vision, grid) if len(full) < depth else {}
    heads, weights = vision.num_heads, 4 * width**2 + _mlp(config, width)
    merger = merge**2 * width * (merge**2 * width + out)
    return Geometry(
        tower=Tower(
            layers=Layers(depth, width, weights, heads, heads, width // heads, windows=(None,) * depth),
            crops=(raster,),
            unit=merge**2,
            blocks=tuple({h * w: t} if layer in full else windows for layer in range(depth)),
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
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def windows_of(vision: Any, grid: Grid) -> Counter[int]:
    """Attention windows of one image: patches -> how many. Those at the right and lower edge hold what is left."""
    t, h, w = grid
    side = vision.window_size // vision.patch_size // vision.spatial_merge_size * vision.spatial_merge_size
    rows, columns = ([side] * (n // side) + [n % side] * (n % side > 0) for n in (h, w))
    return Counter(a * b for a in rows for b in columns for _ in range(t))


def _mlp(config: Any, width: int) -> int:
    vision = config.vision_config
    if config.model_type == "qwen2_vl":
        return 2 * width * int(width * vision.mlp_ratio)
    # Qwen2.5's is gated.
    return (3 if config.model_type == "qwen2_5_vl" else 2) * width * vision.intermediate_size
