"""Gemma 3: SigLIP over 8 x 8 patches, 2 x 2 of them averaged to a token; layers with windows of 12 tokens and full
ones in turn; the tokens of an image see each other both ways."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from family import Draw, Family, Picture
from tiny_models import IMG, SIZE, TOKENS, VISION, VISION_END, VISION_START
from torch import Tensor
from transformers import Gemma3ImageProcessorPil

SIDE = 2 * SIZE
KINDS = ["sliding_attention", "full_attention"] * 2


class Tiny(Family):
    classes = "Gemma3"
    image = other = odd = (SIDE, SIDE)
    pictures = ((SIDE, SIDE, 1),)
    unit = 4
    types, window, both_ways = "token_type_ids", 12, True
    written = "<|vision_start|>"
    shipped_picture = TOKENS
    checkpoints = {
        "google/gemma-3-4b-it": 4300,
        "google/gemma-3-12b-it": 12187,
        "google/gemma-3-27b-it": 27432,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        own = {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": KINDS, "sliding_window": self.window}
        tower = {**VISION, "model_type": "siglip_vision_model", "vision_use_head": False, "image_size": SIDE}
        return {
            "text_config": {**own, **text},
            "vision_config": tower,
            "mm_tokens_per_image": TOKENS,
            "image_token_index": IMG,
            "boi_token_index": VISION_START,
            "eoi_token_index": VISION_END,
        }

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        images = Gemma3ImageProcessorPil(size={"height": SIDE, "width": SIDE})
        parts = {"boi_token": self.written, "image_token": self.words[0], "eoi_token": "<|vision_end|>"}
        tokenizer._set_model_specific_special_tokens(parts)
        return kind(images, tokenizer, image_seq_length=TOKENS, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return "img"

    def sized(self, kind: str, given: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if given else super().sized(kind, given)

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        return [VISION_START, *super().placeholders(picture, words), VISION_END]

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        return {"pixel_values": draw(len(pictures), 3, SIDE, SIDE)} if pictures else {}

    def beside(self, ids: Tensor, images: Sequence[int]) -> dict[str, Tensor]:
        return {"token_type_ids": (ids == IMG).long()}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        return [Picture("image", self.image)] * len(batch.get("pixel_values", ())), []
