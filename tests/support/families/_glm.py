"""What the GLM-4V families share: grids as Qwen's, one placeholder for images and videos, and a timestamp behind every
frame of a video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import transformers
from family import Picture
from packaging.version import Version
from tiny_models import IMG, SIZE, VID, VISION_END, VISION_START
from torch import Tensor
from transformers import Glm4vImageProcessorPil

from families._qwen import MROPE, Qwen
from vtoken.evals.cost.geometry.glm4v import patch_grid

VIDEO_START, VIDEO_END = VISION_END + 1, VISION_END + 2
IDS = {
    "image_token_id": IMG,
    "video_token_id": VID,
    "image_start_token_id": VISION_START,
    "image_end_token_id": VISION_END,
    "video_start_token_id": VIDEO_START,
    "video_end_token_id": VIDEO_END,
}


class Glm(Qwen):
    other, odd = (1, 8, 4), (1, 6, 4)
    words = ("<|image|>", "<|video|>")
    one_placeholder = True
    rotates_part = True
    # It repeats image by image, not row by row.
    expands_several = False
    # The tower reads its table of positions past the module that accelerate brings in.
    offloads = False
    # From 5.18 on it counts the id that stands in no prompt, and then has no features left.
    video_beams = Version(transformers.__version__) < Version("5.18")
    sizes = staticmethod(patch_grid)
    least, most = 9, 86 * 86

    def tower(self) -> dict[str, Any]:
        return {"out_hidden_size": 32, "intermediate_size": 96, "image_size": SIZE}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        # Three of the four pairs of channels of a head are rotated.
        rope = {**MROPE, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.75}
        return {**super().fields({"rope_parameters": rope, **text}), **IDS}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        limits = {"shortest_edge": 2 * 56 * 56, "longest_edge": 2 * 112 * 112}
        return kind(Glm4vImageProcessorPil(patch_size=14, merge_size=2, size=limits), tokenizer, **options)

    def marker(self, kind: str) -> int:
        return IMG

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        run = [IMG] * self.tokens(picture)
        if picture.kind == "image":
            return [VISION_START, *run, VISION_END]
        frames = picture.spec[0]
        ids = [VIDEO_START]
        for _ in range(frames):
            # A word stands for the timestamp.
            ids += [VISION_START, *run[: len(run) // frames], VISION_END, *words(1)]
        return [*ids, VIDEO_END]

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        in_video = (ids == VIDEO_START).cumsum(1) > (ids == VIDEO_END).cumsum(1)
        types = (ids == IMG).long() * (1 + in_video.long())
        return {"mm_token_type_ids": types} if types.any() else {}
