"""VipLlava: LLaVA-1.5 whose features are those of several tower layers, side by side."""

from __future__ import annotations

from typing import Any

from vtoken.adapters.llava import Llava


class VipLlava(Llava):
    """`VipLlavaForConditionalGeneration`. The first column of the tower is always dropped, so it has to be a CLS
    token."""

    model_type = "vipllava"
    towers = {"clip_vision_model": True}

    def selected(self, config: Any) -> tuple[int | list[int], str]:
        layers = config.vision_feature_layers
        return layers if isinstance(layers, int) else list(layers), "default"
