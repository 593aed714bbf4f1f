"""Qwen2.5-VL."""

from vtoken.serving.family import MROPE, Family

FAMILY = Family("Qwen2_5_VLForConditionalGeneration", "vtoken.serving._qwen:Qwen25VL", **MROPE)
