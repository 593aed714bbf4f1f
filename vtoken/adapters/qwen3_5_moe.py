"""Qwen3.5 with a mixture of experts in its decoder layers."""

from __future__ import annotations

from vtoken.adapters._packed import Packed


class Qwen35Moe(Packed):
    """`Qwen3_5MoeForConditionalGeneration`."""

    model_type = "qwen3_5_moe"
    gated_queries = True
