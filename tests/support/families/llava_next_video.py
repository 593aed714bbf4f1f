"""LLaVA-NeXT-Video: LLaVA-NeXT, and videos whose frames are pooled 2 x 2 ahead of the projector."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from family import Draw, Picture
from tiny_models import SIZE, VID
from torch import Tensor

from families.llava_next import Tiny as LlavaNext


class Tiny(LlavaNext):
    classes = "LlavaNextVideo"
    leading = False
    video, other_video = (3,), (4,)
    pictures = (*LlavaNext.pictures, (56, 56, 2), (56, 56, 5))
    equal_videos = pooled_videos = True
    checkpoints = {
        "llava-hf/LLaVA-NeXT-Video-7B-hf": 7063,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {**super().fields(text), "video_token_index": VID}

    def tokens(self, picture: Picture) -> int:
        # The dimensions of a video's features differ between versions.
        return picture.spec[0] * 4 if picture.kind == "video" else super().tokens(picture)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        inputs, frames = super().inputs(pictures, draw), [p.spec[0] for p in pictures if p.kind == "video"]
        if len(set(frames)) > 1:
            raise ValueError(
                f"videos of {sorted(set(frames))} frames in one batch: {self.name} takes videos of equal length only"
            )
        if frames:
            inputs["pixel_values_videos"] = draw(len(frames), frames[0], 3, SIZE, SIZE)
        return inputs

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        return super().found(batch)[0], [Picture("video", (len(v),)) for v in batch.get("pixel_values_videos", ())]
