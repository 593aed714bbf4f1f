"""Qwen2-VL."""

from vtoken.serving.family import MROPE, Family

FAMILY = Family("Qwen2VLForConditionalGeneration", "vtoken.serving._qwen:Qwen2VL", **MROPE)
