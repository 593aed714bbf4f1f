"""LLaVA-1.5."""

from vtoken.serving.family import Family

FAMILY = Family(
    "LlavaForConditionalGeneration",
    "vtoken.serving._llava:Llava",
    tower="vtoken.serving._clip:ClipLike",
    positions="compact",
)
