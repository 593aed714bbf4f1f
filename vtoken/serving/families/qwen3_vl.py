"""Qwen3-VL."""

from vtoken.serving.family import MROPE, Family

FAMILY = Family("Qwen3VLForConditionalGeneration", "vtoken.serving._qwen3:Qwen3VL", **MROPE)
