"""LLaVA-1.5: a CLIP or SigLIP tower, an MLP projector and any decoder of the Llama kind."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._padded import Padded
from vtoken.hooks.state.run import ImageLayout


class Llava(Padded):
    """`LlavaForConditionalGeneration`. Every image has the same number of tokens, in raster order."""

    model_type = "llava"
    expects = "LlavaForConditionalGeneration"

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        return (ImageLayout(((1, self.side, self.side),)),) * len(arguments["pixel_values"])

    def split(self, tokens: int) -> tuple[ImageLayout, ...]:
        images, rest = divmod(tokens, self.patches)
        if rest:
            raise ValueError(
                f"{tokens} image placeholders are not a whole number of images of {self.patches} tokens; "
                "is the prompt prefilled in chunks? Set prefill_chunk_size=None"
            )
        return (ImageLayout(((1, self.side, self.side),)),) * images
