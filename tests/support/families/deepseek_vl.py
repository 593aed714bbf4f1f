"""DeepSeek-VL 1.3B: LLaVA with SigLIP, whose last layer is read behind its norm."""

from __future__ import annotations

from typing import Any

from family import Family
from tiny_models import IMG, SIZE, TOKENS, VISION
from transformers import DeepseekVLImageProcessorPil

from families.llava import Tiny as Llava


class Tiny(Llava):
    classes = "DeepseekVL"
    leading = False
    make = Family.make
    checkpoints = {"deepseek-community/deepseek-vl-1.3b-chat": 1753}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {
            "text_config": {"model_type": "llama", **text},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
            "image_token_id": IMG,
        }

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        images = DeepseekVLImageProcessorPil(size={"height": SIZE, "width": SIZE})
        tokenizer._set_model_specific_special_tokens({"image_token": self.words[0]})
        return kind(images, tokenizer, num_image_tokens=TOKENS, **options)
