"""LLaVA-OneVision."""

from vtoken.serving.family import Family

FAMILY = Family(
    "LlavaOnevisionForConditionalGeneration",
    "vtoken.serving._onevision:LlavaOnevision",
    tower="vtoken.serving._clip:PackedAsMax9",
    positions="compact",
    no_cuts="unpadding takes away another number of the kept tokens from every picture",
    newlines=True,
    crops=True,
)
