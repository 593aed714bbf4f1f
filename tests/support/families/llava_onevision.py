"""LLaVA-OneVision: SigLIP, crops that are scaled down where they are many, several images of one crop each, and
videos."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from family import Draw, Picture, listed
from tiny_models import PINPOINTS, SIZE, TOKENS, TOWERS, VID
from torch import Tensor
from transformers import LlavaOnevisionImageProcessorPil

from families._anyres import ANYRES, Anyres

# Pictures of more than two crops' worth of tokens are scaled down.
ASPECT = {"vision_aspect_ratio": "anyres_max_2"}


class Tiny(Anyres):
    classes = "LlavaOnevision"
    leading = True
    other, odd = (112, 112), (100, 90)
    video, other_video = (3,), (4,)
    # More crops than stay unscaled, and videos.
    pictures = ((56, 56, 1), (300, 40, 1), (101, 99, 1), (77, 333, 1), (56, 56, 2), (56, 56, 5))
    crops_one_only = equal_videos = pooled_videos = True
    shipped_picture = 16 + 25
    checkpoints = {
        "llava-hf/llava-onevision-qwen2-0.5b-ov-hf": 894,
        "llava-hf/llava-onevision-qwen2-7b-ov-hf": 8031,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        ids = {**ANYRES, "video_token_index": VID}
        return {"text_config": {"model_type": "qwen2", **text}, **TOWERS["siglip"], **ids, **ASPECT}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        images = LlavaOnevisionImageProcessorPil(size={"height": SIZE, "width": SIZE}, image_grid_pinpoints=PINPOINTS)
        more = {"num_image_tokens": TOKENS, "vision_feature_select_strategy": "full", **ASPECT}
        return kind(images, tokenizer, **more, **options)

    def tokens(self, picture: Picture) -> int:
        if picture.kind == "image":
            return super().tokens(picture)
        return picture.spec[0] * (TOKENS // 4) + 1  # a newline ends a video; up to 5.17 it is no part of the features

    def features(self, picture: Picture, **more: Tensor) -> Tensor:
        several = {"batch_num_images": torch.tensor([2])} if picture.single else {}
        return super().features(picture, **several, **more)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        inputs, videos = super().inputs(pictures, draw), [p for p in pictures if p.kind == "video"]
        if videos:
            frames = {p.spec[0] for p in videos}
            if len(frames) > 1:
                raise ValueError(
                    f"videos of {sorted(frames)} frames in one batch: {self.name} takes videos of equal length only"
                )
            inputs["pixel_values_videos"] = draw(len(videos), *frames, 3, SIZE, SIZE)
        return inputs

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        return {"batch_num_images": torch.tensor(images)} if max(images) > 1 else {}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        images, _ = super().found(batch)
        single = [n > 1 for n in listed(batch, "batch_num_images") for _ in range(n)] or [False] * len(images)
        images = [p._replace(single=one) for p, one in zip(images, single, strict=True)]
        return images, [Picture("video", (len(v),)) for v in batch.get("pixel_values_videos", ())]
