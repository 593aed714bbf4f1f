"""Qwen3-VL."""

from vtoken.serving.family import MROPE, Family

# The prompt in a picture's key lacks the timestamps of videos, which are text too: so no stage may read the prompt.
FAMILY = Family(
    "Qwen3VLForConditionalGeneration", "vtoken.serving._qwen3:Qwen3VL", text=False, frames_apart=True, **MROPE
)
