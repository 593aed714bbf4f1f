"""LLaVA-NeXT: the downscaled picture and its crops (anyres), stitched and unpadded, with a newline token after each
row."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._anyres import Anyres


class LlavaNext(Anyres):
    """`LlavaNextForConditionalGeneration`."""

    model_type = "llava_next"

    def pack_options(self, arguments: dict[str, Any]) -> dict[str, Any]:
        strategy = arguments.get("vision_feature_select_strategy") or self.model.config.vision_feature_select_strategy
        return {"vision_feature_select_strategy": strategy}
