"""Qwen3-VL: as Qwen2-VL, and features of early blocks (DeepStack) reach the first decoder layers through mergers of
their own."""

from __future__ import annotations

from vtoken.adapters._packed import Packed


class Qwen3VL(Packed):
    """`Qwen3VLForConditionalGeneration`."""

    model_type = "qwen3_vl"
