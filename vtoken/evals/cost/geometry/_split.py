"""What Idefics3 and SmolVLM share: a picture is scaled until its longer side is four crops, cut, and seen once more as
a whole; k x k patches become a token in the connector.

Four crops are what the processors of the checkpoints say; one set to another size, or not to cut, gives others.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._padded import pair, still
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Layers, Pictures, Projector, Tower
from vtoken.hooks.state.parted import crops_of

LONGEST = 4  # crops along the longer side


def cuts(vision: Any, image_size: ImageSize | None) -> tuple[int, int]:
    """(rows, columns) of crops of a picture of this size; None is that of one crop."""
    side = vision.image_size
    height, width = pair(image_size or side)
    # As the processor rounds: the shorter side to even pixels, then up to whole crops.
    shorter = int(LONGEST * side / (max(height, width) / min(height, width)))
    lines = max(1, math.ceil((shorter + shorter % 2) / side))
    return (LONGEST, lines) if height > width else (lines, LONGEST)


def geometry(config: Any, pictures: Pictures) -> Geometry:
    still(config, pictures.frames)
    vision, text, scale = config.vision_config, config.text_config, config.scale_factor
    rows, columns = cuts(vision, pictures.size)
    crops, side = rows * columns + 1, vision.image_size // vision.patch_size
    raster = (1, side // scale, side // scale)
    width, depth, heads = vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads
    weights = 4 * width**2 + 2 * width * vision.intermediate_size
    return Geometry(
        tower=Tower(
            layers=Layers(depth, width, weights, heads, heads, width // heads, windows=(None,) * depth),
            crops=(raster,) * crops,
            unit=scale**2,
            blocks=({side**2: 1},) * depth,
            extra=0,
            stem=vision.num_channels * vision.patch_size**2 * width,
            head_patch=0,
            head_image=0,
            feature_layers=(depth - 1,),
            attention_layer=depth - 1,
        ),
        projectors=(Projector(scale**2 * width * text.hidden_size, depth - 1),),
        parts=(raster,) * crops,
        sources=((1, 1),) * crops,
        newlines=(0, 0),
        decoder=decoder(text),
        vocabulary=text.vocab_size,
        parted_crops=True,
    )


def size_of(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) of a picture with as many crops as the first of a prompt has; None without pictures, or where its
    processor cut otherwise than described above."""
    vision, ids = config.vision_config, prompt.get("input_ids")
    each = (vision.image_size // vision.patch_size // config.scale_factor) ** 2
    shown = None if ids is None else ids == config.image_token_id
    many = 0 if shown is None else int(shown.sum()) // each
    if shown is None or not many:
        return None
    lines, odd = divmod(crops_of(ids, shown, many, each)[0] - 1, LONGEST)
    return (lines * vision.image_size, LONGEST * vision.image_size) if lines and not odd else None


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all crops of a row one after the other [rows, crops, channels, height, width]."""
    vision = config.vision_config
    crops, side = pictures.images * len(shape.parts), vision.image_size
    return {"pixel_values": draw(pictures.rows, crops, vision.num_channels, side, side)}
