"""Gemma 3: every image is resized to the tower's own size, so its size makes no difference; squares of patches are
averaged to a token before the projection."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._padded import crop, crop_pixels, pair, still
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Layers, Pictures, Projector, Tower


def geometry(config: Any, pictures: Pictures) -> Geometry:
    """Raises UnsupportedError for videos and for towers other than SigLIP."""
    still(config, pictures.frames)
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "siglip_vision_model":
        raise UnsupportedError(
            f"no FLOPs account for a vision tower of type {vision.model_type!r}; supported: siglip_vision_model"
        )
    width, mlp, depth = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    heads, head, (down, across) = vision.num_attention_heads, vision.vision_use_head, pair(vision.patch_size)
    (_, rows, columns), side = crop(config), math.isqrt(config.mm_tokens_per_image)
    raster = (1, side, side)
    return Geometry(
        tower=Tower(
            layers=Layers(
                depth, width, 4 * width**2 + 2 * width * mlp, heads, heads, width // heads, windows=(None,) * depth
            ),
            crops=(raster,),
            unit=(rows // side) * (columns // side),
            blocks=({rows * columns: 1},) * depth,
            extra=0,
            stem=vision.num_channels * down * across * width,
            head_patch=head * (2 * width**2 + 2 * width),
            head_image=head * (2 * width**2 + 2 * width * mlp),
            feature_layers=(depth - 1,),
            attention_layer=depth - 1,
        ),
        projectors=(Projector(width * text.hidden_size, depth - 1),),
        parts=(raster,),
        sources=((1, 1),),
        newlines=(0, 0),
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return {"pixel_values": draw(pictures.count, *crop_pixels(config))}
