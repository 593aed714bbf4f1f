"""InternVL: crops at the tower's own size and, where they are several, a thumbnail after them; 2 x 2 patches are
shuffled into a token before the projector."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry._padded import crop, crop_pixels, pair, still
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Layers, Pictures, Projector, Tower
from vtoken.hooks.state.run import runs

MOST = 12  # crops beside the thumbnail, as InternVL's processor is set


def geometry(config: Any, pictures: Pictures) -> Geometry:
    """Raises UnsupportedError for videos, whose frames are pictures here, and for other towers."""
    still(config, pictures.frames)
    vision, text = config.vision_config, config.text_config
    if vision.model_type != "internvl_vision":
        raise UnsupportedError(
            f"no FLOPs account for a vision tower of type {vision.model_type!r}; supported: internvl_vision"
        )
    width, depth, heads = vision.hidden_size, vision.num_hidden_layers, vision.num_attention_heads
    (_, rows, columns), join = crop(config), round(1 / config.downsample_ratio)
    many = crops(pictures.size or rows * pair(vision.patch_size)[0], pair(vision.image_size)[0])
    raster, layer = (1, rows // join, columns // join), config.vision_feature_layer
    layer = layer - 1 if layer >= 0 else depth + layer
    down, across = pair(vision.patch_size)
    return Geometry(
        tower=Tower(
            layers=Layers(
                depth,
                width,
                4 * width**2 + 2 * width * vision.intermediate_size,
                heads,
                heads,
                width // heads,
                windows=(None,) * depth,
            ),
            crops=(raster,) * many,
            unit=join**2,
            blocks=({rows * columns: 1},) * depth,
            extra=1,
            stem=vision.num_channels * down * across * width,
            head_patch=0,
            head_image=0,
            feature_layers=(layer,),
            attention_layer=layer,
        ),
        projectors=(Projector((join**2 * width + text.hidden_size) * text.hidden_size, layer),),
        parts=(raster,) * many,
        sources=((1, 1),) * many,
        newlines=(0, 0),
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def crops(size: ImageSize, side: int) -> int:
    """Of a picture of this size: those of its best canvas of up to `MOST`, and a thumbnail where they are several."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import get_optimal_tiled_canvas

    columns, rows = get_optimal_tiled_canvas(pair(size), (side, side), 1, MOST)
    return columns * rows + (columns * rows > 1)


def size_of(config: Any, prompt: Any) -> tuple[int, int] | None:
    """(height, width) of a picture with as many crops as the first of a prompt has; None without pictures."""
    found = runs(prompt["input_ids"] == config.image_token_id) if "input_ids" in prompt else []
    (_, rows, columns), side = crop(config), pair(config.vision_config.image_size)[0]
    many = found[0] * round(1 / config.downsample_ratio) ** 2 // (rows * columns) if found else 0
    return (side, side * max(1, many - 1)) if many else None


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    return {"pixel_values": draw(pictures.count * len(shape.tower.crops), *crop_pixels(config))}
