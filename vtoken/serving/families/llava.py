"""LLaVA-1.5."""

from vtoken.serving.family import Family

FAMILY = Family("LlavaForConditionalGeneration", "vtoken.serving._llava:Llava", positions="compact")
