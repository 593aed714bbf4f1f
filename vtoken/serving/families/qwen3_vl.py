"""Qwen3-VL."""

from vtoken.serving.family import MROPE, Family

# Pictures are keyed by the prompt without the timestamps of videos, although these are text too.
FAMILY = Family(
    "Qwen3VLForConditionalGeneration", "vtoken.serving._qwen3:Qwen3VL", text=False, frames_apart=True, **MROPE
)
