"""LLaVA-NeXT: CLIP over the picture scaled down and its crops."""

from __future__ import annotations

from typing import Any

from tiny_models import CLIP, PINPOINTS, SIZE, TOWERS
from transformers import LlavaNextImageProcessorPil

from families._anyres import ANYRES, Anyres


class Tiny(Anyres):
    classes = "LlavaNext"
    other, odd = (50, 100), (30, 100)
    # One pinpoint or another, padding above or beside.
    pictures = ((56, 56, 1), (300, 40, 1), (40, 300, 1), (101, 99, 1), (333, 77, 1))
    shipped_picture = 16 + 64
    checkpoints = {
        "llava-hf/llava-v1.6-vicuna-7b-hf": 7063,
        "llava-hf/llava-v1.6-mistral-7b-hf": 7567,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {"text_config": {"model_type": "llama", **text}, **TOWERS["clip"], **ANYRES}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        size = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
        images = LlavaNextImageProcessorPil(**size, image_grid_pinpoints=PINPOINTS)
        return kind(image_processor=images, tokenizer=tokenizer, **CLIP, **options)
