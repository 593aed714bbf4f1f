"""DeepSeek-VL without its high-resolution tower (1.3B): SigLIP, two linear layers, a Llama decoder."""

from __future__ import annotations

from typing import Any

from vtoken.adapters.llava import Llava


class DeepseekVL(Llava):
    """`DeepseekVLForConditionalGeneration`. Features are those of the tower's last layer, behind its norm."""

    model_type = "deepseek_vl"
    towers = {"siglip_vision_model": False}
    tower_name = "vision_model"
    projector_name = "aligner"

    def selected(self, config: Any) -> tuple[int | list[int], str]:
        return -1, "full"
