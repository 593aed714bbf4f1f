"""What the LLaVA families share: equal crops through CLIP or SigLIP, a projector on every patch, then packing."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, ImageSize, Layers, Pictures, Projector, Tower
from vtoken.stages import Parts, size_of

TOWERS = ("clip_vision_model", "siglip_vision_model")
BILINEAR = 4  # patches that an interpolated token comes from


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def anyres(config: Any, image_size: ImageSize | None, most: int | None = None) -> Geometry:
    """The downscaled image, then the crops of the best pinpoint, stitched, unpadded, one newline per row.

    Args:
        image_size: None is the tower's own size.
        most: crops' worth of tokens above which the stitched crops are scaled down.
    """
    size = pair(image_size or config.vision_config.image_size)
    module: Any = _module(config)
    whole = _, side, _ = crop(config)
    down, across = module.get_anyres_image_grid_shape(
        size, config.image_grid_pinpoints, config.vision_config.image_size
    )
    stitched = torch.empty(1, down * side, across * side, device="meta")
    _, rows, columns = module.unpad_image(stitched, size).shape
    mixed = 1
    if most is not None:
        ratio = math.sqrt(rows * columns / (most * side**2))
        # The thresholds are the model's: see pack_image_features.
        if ratio > 1.1:
            rows, columns, mixed = int(rows // ratio), int(columns // ratio), BILINEAR
    return padded(config, (whole, (1, rows, columns)), ((1, 1), (down * across, mixed)), (rows, columns))


def padded(
    config: Any,
    parts: Parts,
    sources: tuple[tuple[int, int], ...] = ((1, 1),),
    newlines: tuple[int, int] = (0, 0),
    extra: int = 0,
) -> Geometry:
    """The whole model; `parts`, `sources` and `newlines` as in Geometry, `extra` as in Projector."""
    vision, text = config.vision_config, config.text_config
    features = chosen_layers(config)
    projector = (vision.hidden_size * len(features) + text.hidden_size) * text.hidden_size
    return Geometry(
        tower=_tower(config, sum(crops for crops, _ in sources), features),
        projectors=(Projector(projector, max(features), extra=extra),),
        parts=parts,
        sources=sources,
        newlines=newlines,
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def chosen_layers(config: Any) -> tuple[int, ...]:
    """Tower layers whose outputs become the features."""
    # Up to 5.17 VipLlava's config has the other name only; DeepSeek-VL always reads the last layer.
    names = ("vision_feature_layer", "vision_feature_layers")
    chosen = next((getattr(config, name) for name in names if hasattr(config, name)), -1)
    depth = config.vision_config.num_hidden_layers
    # hidden_states[0] is the embedding, so entry h is the output of layer h - 1.
    return tuple(h - 1 if h >= 0 else depth + h for h in ([chosen] if isinstance(chosen, int) else chosen))


def _tower(config: Any, crops: int, features: tuple[int, ...]) -> Tower:
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise UnsupportedError(
            f"no FLOPs account for a vision tower of type {vision.model_type!r}; supported: {', '.join(TOWERS)}"
        )
    clip = vision.model_type == "clip_vision_model"
    strategy = getattr(config, "vision_feature_select_strategy", "default" if clip else "full")
    if clip != (strategy == "default"):
        raise UnsupportedError(
            f"vision_feature_select_strategy={strategy!r} with a {vision.model_type!r} "
            f"tower {'keeps CLS among the patches' if clip else 'drops the first patch'}; use "
            f"{'default' if clip else 'full'!r}"
        )
    width, mlp, depth = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    patch_h, patch_w = pair(vision.patch_size)
    heads = vision.num_attention_heads
    head = not clip and vision.vision_use_head
    raster = crop(config)
    return Tower(
        layers=Layers(
            depth, width, 4 * width**2 + 2 * width * mlp, heads, heads, width // heads, windows=(None,) * depth
        ),
        crops=(raster,) * crops,
        unit=1,
        blocks=({size_of((raster,)): 1},) * depth,
        extra=int(clip),
        stem=vision.num_channels * patch_h * patch_w * width,
        # SigLIP's head attends from one query: keys and values of every patch, then query, output and MLP once.
        head_patch=head * (2 * width**2 + 2 * width),
        head_image=head * (2 * width**2 + 2 * width * mlp),
        feature_layers=features,
        attention_layer=max(features),
    )


def crop(config: Any) -> tuple[int, int, int]:
    """The raster of one crop, in patches."""
    (image_h, image_w), (patch_h, patch_w) = (
        pair(config.vision_config.image_size),
        pair(config.vision_config.patch_size),
    )
    return 1, image_h // patch_h, image_w // patch_w


def _module(config: Any) -> Any:
    """The family's modelling file, which defines its anyres arithmetic."""
    return import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")


def still(config: Any, frames: int) -> None:
    """Refuses videos."""
    if frames != 1:
        raise UnsupportedError(
            f"frames={frames}: {config.model_type} takes no video; count every frame as one of `images`"
        )


def crop_pixels(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of one crop in pixels."""
    return (config.vision_config.num_channels, *pair(config.vision_config.image_size))


def anyres_inputs(config: Any, shape: Geometry, asked: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of all crops [images, crops, channels, height, width], and the images' sizes [images, 2]."""
    size = pair(asked.size or config.vision_config.image_size)
    pixels = draw(asked.count, len(shape.tower.crops), *crop_pixels(config))
    return {"pixel_values": pixels, "image_sizes": torch.tensor([size] * asked.count)}
