"""PaddleOCR-VL: grids as Qwen's, patches row by row in the tower, and no videos."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from family import Draw, Picture
from tiny_models import PATCH, SIZE, VISION
from torch import Tensor
from transformers import PaddleOCRVLImageProcessorPil

from families._qwen import IDS, MROPE, Qwen
from vtoken.evals.cost.geometry.paddleocr_vl import patch_grid


class Tiny(Qwen):
    classes = "PaddleOCRVL"
    by_grids = True
    other, odd = (1, 8, 4), (1, 6, 4)
    video, other_video = None, ()
    pictures = ((56, 56, 1), (84, 140, 1), (196, 56, 1), (20, 300, 1))
    sizes = staticmethod(patch_grid)
    least, most = 192, 54 * 54
    checkpoints = {"PaddlePaddle/PaddleOCR-VL": 906}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        # Of two that differ, tied embeddings win.
        text = {"rope_parameters": MROPE, "head_dim": 8, "tie_word_embeddings": False, **text}
        return {**IDS, "text_config": text, "vision_config": {**VISION, "image_size": SIZE, "spatial_merge_size": 2}}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        tokenizer._set_model_specific_special_tokens({"image_token": self.words[0]})
        limits = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}
        return kind(PaddleOCRVLImageProcessorPil(size=limits), tokenizer, **options)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        grids = [p.spec for p in pictures]
        if not grids:
            return {}
        pixels = draw(sum(map(prod, grids)), 3, PATCH, PATCH)
        return {"pixel_values": pixels, "image_grid_thw": torch.tensor(grids)}
