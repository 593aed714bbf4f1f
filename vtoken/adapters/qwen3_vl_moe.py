"""Qwen3-VL with a mixture of experts in its decoder layers: tower, DeepStack and positions are those of Qwen3-VL."""

from __future__ import annotations

from vtoken.adapters._packed import Packed


class Qwen3VLMoe(Packed):
    """`Qwen3VLMoeForConditionalGeneration`."""

    model_type = "qwen3_vl_moe"
