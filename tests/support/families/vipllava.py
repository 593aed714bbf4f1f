"""VipLlava: LLaVA with CLIP, whose features are those of two layers side by side."""

from __future__ import annotations

from typing import Any

from family import Family
from tiny_models import IMG, TOKENS, VISION

from families.llava import Tiny as Llava


class Tiny(Llava):
    classes, processes = "VipLlava", "Llava"
    leading = False
    make = Family.make
    checkpoints = {
        "llava-hf/vip-llava-7b-hf": 7080,
        "llava-hf/vip-llava-13b-hf": 13372,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
            "vision_feature_layers": [-1, -2],
            "image_token_index": IMG,
            "image_seq_length": TOKENS,
        }
