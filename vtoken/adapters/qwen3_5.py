"""Qwen3.5: the tower of Qwen3-VL without DeepStack; most decoder layers keep a state (gated delta rule) instead of
attending."""

from __future__ import annotations

from vtoken.adapters._packed import Packed


class Qwen35(Packed):
    """`Qwen3_5ForConditionalGeneration`."""

    model_type = "qwen3_5"
    gated_queries = True
