"""What follows from the field names that the configs of most families share: the vision tower, the model around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.adapters._padded import feature_layers
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Layers, Pictures, Projector, Tower
from vtoken.stages import Parts, size_of


def pair(size: Any) -> tuple[int, int]:
    """(height, width) of a size given as one number or two."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def crop(config: Any) -> tuple[int, int, int]:
    """The raster of one crop of the tower's own size, in patches."""
    vision = config.vision_config
    (image_h, image_w), (patch_h, patch_w) = pair(vision.image_size), pair(vision.patch_size)
    return 1, image_h // patch_h, image_w // patch_w


def check_tower(config: Any, *known: str) -> None:
    """Refuses vision towers of other types than these."""
    kind = config.vision_config.model_type
    if kind not in known:
        raise UnsupportedError(f"no FLOPs account for a vision tower of type {kind!r}; supported: {', '.join(known)}")


def check_still(config: Any, pictures: Pictures) -> None:
    """Refuses videos."""
    if pictures.frames != 1:
        raise UnsupportedError(
            f"frames={pictures.frames}: {config.model_type} takes no video; count every frame as one of `images`"
        )


def vision_tower(
    config: Any, crops: Parts, unit: int = 1, *, width: int | None = None, mlp: int | None = None, extra: int = 0
) -> Tower:
    """A tower in which every patch attends to all of its crop.

    Args:
        crops, unit, extra: as in Tower.
        width: channels of a patch; None: hidden_size.
        mlp: numbers in the matrices of one layer's MLP; None: two of width x intermediate_size.
    """
    vision = config.vision_config
    width = vision.hidden_size if width is None else width
    mlp = 2 * width * vision.intermediate_size if mlp is None else mlp
    depth, heads = _named(vision, "num_hidden_layers", "depth"), _named(vision, "num_attention_heads", "num_heads")
    (down, across), frames = pair(vision.patch_size), getattr(vision, "temporal_patch_size", 1)
    features = read_layers(config, depth)
    # SigLIP's head attends from one query: keys and values of every patch, then query, output and MLP once.
    head = 2 * width**2 if getattr(vision, "vision_use_head", False) else 0
    return Tower(
        layers=Layers(
            depth, width, (4 * width**2 + mlp,) * depth, heads, heads, width // heads, windows=(None,) * depth
        ),
        crops=crops,
        unit=unit,
        blocks=({size_of(crops[:1]) * unit: 1},) * depth,
        extra=extra,
        patch=_named(vision, "num_channels", "in_channels") * frames * down * across,
        head_patch=head and head + 2 * width,
        head_image=head and head + mlp,
        feature_layers=features,
        attention_layer=max(features),
    )


def model(
    config: Any,
    tower: Tower,
    projector: int,
    parts: Parts | None = None,
    sources: tuple[tuple[int, int], ...] | None = None,
    newlines: tuple[int, int] = (0, 0),
) -> Geometry:
    """The whole model.

    Args:
        projector: numbers in its matrices; it reads the last of the tower's feature layers.
        parts, sources, newlines: as in Geometry; None: every crop is a part.
    """
    text = config.text_config
    parts = tower.crops if parts is None else parts
    return Geometry(
        tower=tower,
        projectors=(Projector(projector, max(tower.feature_layers)),),
        parts=parts,
        sources=((1, 1),) * len(parts) if sources is None else sources,
        newlines=newlines,
        decoder=decoder(text),
        vocabulary=text.vocab_size,
    )


def read_layers(config: Any, depth: int) -> tuple[int, ...]:
    """Tower layers whose outputs become the features: the last, where the config names none."""
    # Up to 5.17 VipLlava's config has the other name only.
    plural = getattr(config, "vision_feature_layers", -1)
    return feature_layers(getattr(config, "vision_feature_layer", plural), depth)


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    """Pixels of the crops of all pictures, one after the other [crops, channels, height, width]."""
    return {"pixel_values": draw(pictures.count * len(shape.tower.crops), *crop_pixels(config))}


def crop_pixels(config: Any) -> tuple[int, int, int]:
    """(channels, height, width) of one crop in pixels."""
    return (config.vision_config.num_channels, *pair(config.vision_config.image_size))


def image_sizes(size: Any, pictures: Pictures) -> Tensor:
    """[images, 2] of pictures that are equally large."""
    return torch.tensor([pair(size)] * pictures.count)


def _named(config: Any, *names: str) -> int:
    """The field that has one of these names."""
    return int(next(getattr(config, name) for name in names if hasattr(config, name)))
