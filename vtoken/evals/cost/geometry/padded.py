"""LLaVA-1.5, LLaVA-NeXT and LLaVA-OneVision: equal crops through CLIP or SigLIP, a projector on every patch, then packing."""

from __future__ import annotations

import math
from importlib import import_module
from typing import Any

import torch

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Geometry, Layers, Projector, Tower
from vtoken.evals.shared.options import ImageSize
from vtoken.stages import Grid, Parts, size_of

TOWERS = ("clip_vision_model", "siglip_vision_model")
BILINEAR = 4  # patches behind an interpolated token


def llava(config: Any, image_size: ImageSize | None, images: int, frames: int) -> Geometry:
    """LLaVA: every image is resized to the tower's own size, so `image_size` makes no difference."""
    _refuse_video(config, frames)
    return _geometry(config, (_crop(config),), ((1, 1),), (0, 0))


def llava_next(config: Any, image_size: ImageSize | None, images: int, frames: int) -> Geometry:
    """LLaVA-NeXT: the downscaled image, then the crops of the best pinpoint, stitched, unpadded, one newline per row. Without
    `image_size` images are as large as the tower's."""
    _refuse_video(config, frames)
    return _anyres(config, image_size)


def llava_onevision(config: Any, image_size: ImageSize | None, images: int, frames: int) -> Geometry:
    """LLaVA-OneVision: one image per prompt as in LLaVA-NeXT, the stitched crops downscaled where they are too many; of several
    images each is a single crop; a video is its frames, each at the tower's own size, pooled 2 x 2, with one newline."""
    _, side, _ = _crop(config)
    if frames > 1:
        half = math.ceil(side / 2)
        return _geometry(config, ((frames, half, half),), ((frames, BILINEAR),), (1, frames * half**2))
    if images > 1:
        return _geometry(config, ((1, side, side),), ((1, 1),), (1, side**2))
    return _anyres(config, image_size)


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _anyres(config: Any, image_size: ImageSize | None) -> Geometry:
    own, size = config.vision_config.image_size, pair(image_size or config.vision_config.image_size)
    # The family's modelling file defines its anyres arithmetic.
    module: Any = import_module(f"transformers.models.{config.model_type}.modeling_{config.model_type}")
    crop = _, side, _ = _crop(config)
    down, across = module.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, own)
    stitched = torch.empty(1, down * side, across * side, device="meta")
    _, rows, columns = module.unpad_image(stitched, size).shape
    mixed = 1
    if config.model_type == "llava_onevision":
        most = int(config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * side**2))
        if ratio > 1.1:  # The threshold is the model's: see pack_image_features.
            rows, columns, mixed = int(rows // ratio), int(columns // ratio), BILINEAR
    return _geometry(config, (crop, (1, rows, columns)), ((1, 1), (down * across, mixed)), (rows, columns))


def _geometry(config: Any, parts: Parts, sources: tuple[tuple[int, int], ...], newlines: tuple[int, int]) -> Geometry:
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else list(chosen)
    vision, text = config.vision_config, config.text_config
    # hidden_states[0] is the embedding, so entry h is the output of layer h - 1.
    features = tuple(h - 1 if h >= 0 else vision.num_hidden_layers + h for h in chosen)
    projector = (vision.hidden_size * len(features) + text.hidden_size) * text.hidden_size
    return Geometry(
        tower=_tower(config, sum(crops for crops, _ in sources), features),
        projectors=(Projector(projector, max(features)),),
        parts=parts,
        sources=sources,
        newlines=newlines,
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def _tower(config: Any, crops: int, features: tuple[int, ...]) -> Tower:
    vision = config.vision_config
    if vision.model_type not in TOWERS:
        raise UnsupportedError(
            f"no FLOPs account for a vision tower of type {vision.model_type!r}; supported: {', '.join(TOWERS)}"
        )
    clip = vision.model_type == "clip_vision_model"
    if clip != (config.vision_feature_select_strategy == "default"):
        raise UnsupportedError(
            f"vision_feature_select_strategy={config.vision_feature_select_strategy!r} with a {vision.model_type!r} tower "
            f"{'keeps CLS among the patches' if clip else 'drops the first patch'}; use {'default' if clip else 'full'!r}"
        )
    width, mlp, depth = vision.hidden_size, vision.intermediate_size, vision.num_hidden_layers
    patch_h, patch_w = pair(vision.patch_size)
    heads, crop = vision.num_attention_heads, _crop(config)
    head = not clip and vision.vision_use_head
    weights = 4 * width**2 + 2 * width * mlp
    return Tower(
        layers=Layers(depth, width, weights, heads, heads, width // heads, windows=(None,) * depth),
        crops=(crop,) * crops,
        unit=1,
        blocks=({size_of((crop,)): 1},) * depth,
        extra=int(clip),
        stem=vision.num_channels * patch_h * patch_w * width,
        # SigLIP's head attends from one query: keys and values of every patch, then query, output and MLP once.
        head_patch=head * (2 * width**2 + 2 * width),
        head_image=head * (2 * width**2 + 2 * width * mlp),
        feature_layers=features,
        attention_layer=max(features),
    )


def _crop(config: Any) -> Grid:
    vision = config.vision_config
    rows, columns = (
        side // patch for side, patch in zip(pair(vision.image_size), pair(vision.patch_size), strict=True)
    )
    return 1, rows, columns


def _refuse_video(config: Any, frames: int) -> None:
    if frames != 1:
        raise UnsupportedError(
            f"frames={frames}: {config.model_type} takes no video; count every frame as one of `images`"
        )
