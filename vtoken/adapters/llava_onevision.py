"""LLaVA-OneVision: anyres crops that are scaled down when there are more than nine, one crop each for several images,
and video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.adapters._anyres import Anyres
from vtoken.hooks.state.run import FeatureCall, ImageLayout


class LlavaOnevision(Anyres):
    """`LlavaOnevisionForConditionalGeneration`. Every video frame is pooled to half its side; one newline ends the
    video."""

    model_type = "llava_onevision"
    features = {"image": "get_image_features", "video": "get_video_features"}

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.placeholders["video"] = model.config.video_token_id

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        if kind == "image":
            return super().layouts(kind, arguments)
        # Up to 5.17 the argument is called pixel_values.
        pixels: Any = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
        videos, frames = pixels.shape[:2]
        return (video_layout(frames, self.side),) * videos

    def pack(self, call: FeatureCall, values: Tensor) -> Tensor:
        if call.kind == "image":
            return super().pack(call, values)
        return self.outer.apply_pooling(values).flatten(0, 1)

    def whole(self, arguments: dict[str, Any]) -> list[bool]:
        counts = arguments.get("batch_num_images")
        if counts is None:
            return super().whole(arguments)
        return [n != 1 for n in counts for _ in range(int(n))]

    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        return {"vision_aspect_ratio": arguments.get("vision_aspect_ratio") or self.model.config.vision_aspect_ratio}


def video_layout(frames: int, side: int) -> ImageLayout:
    """The layout of a video whose frames have side x side patches."""
    side = -(-side // 2)
    tokens = frames * side**2
    newline = torch.arange(tokens + 1) == tokens
    segment = torch.arange(frames).repeat_interleave(side**2) if frames > 1 else None
    line = torch.zeros(tokens, dtype=torch.long)
    return ImageLayout(((frames, side, side),), segment, newline, line, interpolated=True)
