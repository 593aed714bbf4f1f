"""Video-LLaVA: pictures as in LLaVA-1.5; every frame of a video is one crop, whose CLS token stands in front of its
patches in the prompt. Both towers are built alike."""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

from torch import Tensor

from vtoken.evals.cost.geometry._padded import padded
from vtoken.evals.cost.geometry.from_config import crop, crop_pixels
from vtoken.evals.cost.geometry.shapes import Draw, Geometry, Pictures


def geometry(config: Any, pictures: Pictures) -> Geometry:
    (_, height, width), frames = crop(config), pictures.frames
    if frames == 1:
        return padded(config, (crop(config),))
    shape = padded(config, ((frames, height, width),), ((frames, 1),), (frames, height * width))
    (projector,) = shape.projectors
    return replace(shape, projectors=(replace(projector, extra=1),))


def inputs(config: Any, shape: Geometry, pictures: Pictures, draw: Draw) -> dict[str, Tensor]:
    if pictures.frames > 1:
        return {"pixel_values_videos": draw(pictures.count, pictures.frames, *crop_pixels(config))}
    from transformers import VideoLlavaForConditionalGeneration

    # Up to 5.22 it has another name.
    new = "pixel_values" in signature(VideoLlavaForConditionalGeneration.forward).parameters
    return {"pixel_values" if new else "pixel_values_images": draw(pictures.count, *crop_pixels(config))}
