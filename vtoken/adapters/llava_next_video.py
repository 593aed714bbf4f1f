"""LLaVA-NeXT-Video: pictures as in LLaVA-NeXT; a video's frames are single crops, pooled ahead of the projector."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from vtoken.adapters.llava_next import LlavaNext
from vtoken.hooks.state.run import FeatureCall, ImageLayout


class LlavaNextVideo(LlavaNext):
    """`LlavaNextVideoForConditionalGeneration`. A video has no newline tokens."""

    model_type = "llava_next_video"
    features = {"image": "get_image_features", "video": "get_video_features"}

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.placeholders["video"] = model.config.video_token_id
        self.resampler, self.stride = self.outer.vision_resampler, model.config.spatial_pool_stride

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        if kind == "image":
            return super().layouts(kind, arguments)
        # Up to 5.17 the argument is called pixel_values.
        pixels: Any = arguments.get("pixel_values_videos", arguments.get("pixel_values"))
        videos, frames = pixels.shape[:2]
        side = self.side // self.stride
        segment = torch.arange(frames).repeat_interleave(side**2) if frames > 1 else None
        return (ImageLayout(((frames, side, side),), segment, interpolated=True),) * videos

    def pack(self, call: FeatureCall, values: Tensor) -> Tensor:
        """Values of a video are averaged, however the model pools its features."""
        if call.kind == "image":
            return super().pack(call, values)
        rasters = values.unflatten(1, (self.side, self.side)).permute(0, 3, 1, 2)
        return avg_pool2d(rasters, self.stride).permute(0, 2, 3, 1).flatten(0, 2)
