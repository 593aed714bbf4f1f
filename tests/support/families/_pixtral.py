"""What families with a Pixtral tower share: pictures of their own size, with a token of its own between their rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from family import Draw, Family, Picture, listed
from tiny_models import IMG, PATCH, VISION, VISION_END, VISION_START
from torch import Tensor
from transformers import PixtralImageProcessorPil

BREAK, END = VISION_START, VISION_END


class Pixtral(Family):
    processes = "Pixtral"
    varlen = by_rows = rows_parted = True
    # Sizes come with the call, and the model reads them on the host as well; breaks that stay depend on what was kept.
    waits = (
        ("asked", "features.py:<dictcomp>"),
        ("asked", "image_spans.py:check"),
        ("asked", "prefill_state.py:leave"),
    )

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {
            "text_config": {"model_type": "mistral", "sliding_window": None, **text},
            "vision_config": {"model_type": "pixtral", "rope_parameters": None, **VISION, "image_size": 448},
            "vision_feature_layer": -1,
            "image_token_index": IMG,
        }

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        edge = math.isqrt(self.unit)
        images = PixtralImageProcessorPil(size={"longest_edge": 112}, patch_size=PATCH * edge)
        words = {
            "image_token": self.words[0],
            "image_break_token": "<|vision_start|>",
            "image_end_token": "<|vision_end|>",
        }
        return kind(images, tokenizer, patch_size=PATCH, spatial_merge_size=edge, **words, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        edge = PATCH * math.isqrt(self.unit)
        return ("img", (-(-height // edge) * edge, -(-width // edge) * edge))

    def raster(self, picture: Picture) -> tuple[int, int]:
        """Rows and columns of tokens."""
        height, width = picture.spec
        edge = PATCH * math.isqrt(self.unit)
        return height // edge, width // edge

    def tokens(self, picture: Picture) -> int:
        rows, columns = self.raster(picture)
        return rows * columns + rows - 1

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        rows, columns = self.raster(picture)
        return ([IMG] * columns + [BREAK]) * (rows - 1) + [IMG] * columns + [END]

    def breaks(self, ids: Tensor) -> Tensor:
        return ids == BREAK

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        if not pictures:
            return {}
        sizes = torch.tensor([p.spec for p in pictures])
        pixels = torch.zeros(len(pictures), 3, *sizes.max(0).values.tolist())
        for image, (height, width) in zip(pixels, sizes.tolist(), strict=True):
            image[:, :height, :width] = draw(3, height, width)
        return {"pixel_values": pixels, "image_sizes": sizes}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        return [Picture("image", tuple(size)) for size in listed(batch, "image_sizes")], []
