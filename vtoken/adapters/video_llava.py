"""Video-LLaVA: LLaVA-1.5 with two CLIP towers, one for pictures and one for the frames of videos."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtoken.adapters._padded import Padded, layers_of
from vtoken.hooks.state.run import ImageLayout, pixels_of


class VideoLlava(Padded):
    """`VideoLlavaForConditionalGeneration`. A frame's CLS token stands in front of its patches and follows the newline
    policy."""

    model_type = "video_llava"
    features = {"image": "get_image_features", "video": "get_video_features"}
    towers = {"clip_vision_model": True}
    tower_name = "image_tower"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.placeholders["video"] = model.config.video_token_id
        tower = self.outer.video_tower
        self.encoder = replace(self.encoder, twins=((tower, layers_of(tower)),))

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        pixels = pixels_of(kind, arguments)
        if kind == "image":
            return (ImageLayout(((1, self.side, self.side),)),) * len(pixels)
        videos, frames = pixels.shape[:2]
        return (video_layout(frames, self.side),) * videos


def video_layout(frames: int, side: int) -> ImageLayout:
    """The layout of a video: in each frame, a CLS token in front of side x side patches."""
    each = side**2
    cls = torch.arange(frames * (each + 1)) % (each + 1) == 0
    frame = torch.arange(frames).repeat_interleave(each)
    return ImageLayout(((frames, side, side),), frame if frames > 1 else None, cls, frame, encoded=True)
