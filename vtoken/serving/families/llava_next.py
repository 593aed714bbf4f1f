"""LLaVA-NeXT."""

from vtoken.serving.family import Family

FAMILY = Family(
    "LlavaNextForConditionalGeneration",
    "vtoken.serving._next:LlavaNext",
    tower="vtoken.serving._clip:ClipLike",
    positions="compact",
    no_cuts="unpadding takes away another number of the kept tokens from every picture",
    newlines=True,
    crops=True,
)
