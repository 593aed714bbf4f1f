"""Qwen3-VL."""

from vtoken.serving.family import MROPE, Family

# The prompt that a picture is keyed by is without the timestamps of videos, which are text, too.
FAMILY = Family(
    "Qwen3VLForConditionalGeneration", "vtoken.serving._qwen3:Qwen3VL", text=False, frames_apart=True, **MROPE
)
