"""Qwen2-VL: every block attends to the whole image, or frame of a video."""

from __future__ import annotations

from vtoken.adapters._packed import Packed


class Qwen2VL(Packed):
    """`Qwen2VLForConditionalGeneration`."""

    model_type = "qwen2_vl"
