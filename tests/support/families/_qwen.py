"""What the Qwen families share: a packed tower over grids of patches, 2 x 2 of them to a token, and positions of three
axes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from family import Draw, Family, Picture, Spec, listed
from tiny_models import IMG, PATCH, VID, VISION_END, VISION_START
from torch import Tensor
from transformers import Qwen2VLImageProcessorPil

from vtoken.evals.cost.geometry._packed import patch_grid

VISION = {
    "depth": 4,
    "num_heads": 4,
    "hidden_size": 32,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
IDS = {
    "image_token_id": IMG,
    "video_token_id": VID,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}


class Qwen(Family):
    image, video, other_video = (1, 4, 8), (2, 4, 4), (4, 8, 4)
    # Windows of 2 x 2 tokens that are ragged at both edges, at one, at none.
    pictures = ((56, 56, 1), (84, 140, 1), (196, 56, 1), (20, 300, 1), (56, 56, 2), (84, 140, 5))
    unpadded = (112, 140)
    varlen, unit = True, 4
    types = "mm_token_type_ids"
    shipped_picture = 9
    words, around = ("<|image_pad|>", "<|video_pad|>"), ("<|vision_start|>", "<|vision_end|>")
    # Grids come with the call, and the model reads them on the host as well.
    waits = (("asked", "_packed.py:layouts"),)

    def tower(self) -> dict[str, Any]:
        """Fields of the vision config beside `VISION`."""
        raise NotImplementedError

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        tower = {**VISION, **self.tower()}
        return {**IDS, "text_config": {"rope_parameters": MROPE, **text}, "vision_config": tower}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        images = Qwen2VLImageProcessorPil(patch_size=14, merge_size=2, size=limits)
        return kind(images, tokenizer, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        grid = patch_grid(self.stock.config.vision_config, (height, width), frames)
        return ("img", grid) if frames == 1 else ("video", *grid)

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        return [VISION_START, *super().placeholders(picture, words), VISION_END]

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        inputs = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            grids = [p.spec for p in pictures if p.kind == kind]
            if grids:
                inputs[pixels] = draw(sum(map(prod, grids)), 3 * 2 * PATCH * PATCH)
                inputs[f"{kind}_grid_thw"] = torch.tensor(grids)
        return inputs

    def rows(self, picture: Picture) -> int:
        return prod(picture.spec)

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        types = (ids == IMG).long() + 2 * (ids == VID)
        return {"mm_token_type_ids": types} if types.any() else {}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        images, videos = (
            [Picture(kind, tuple(grid)) for grid in listed(batch, f"{kind}_grid_thw")] for kind in ("image", "video")
        )
        return images, videos

    def frames(self, video: Spec) -> tuple[int, int]:
        return video[0], video[1] * video[2]
