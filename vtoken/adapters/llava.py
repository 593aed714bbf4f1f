"""LLaVA-1.5: a CLIP or SigLIP tower, an MLP projector and any decoder of the Llama kind. With a Pixtral tower
(Pixtral-12B) it has an adapter of its own."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._padded import TOWERS, Padded
from vtoken.adapters._pixtral import Pixtral
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout


class Llava(Padded):
    """`LlavaForConditionalGeneration`. Every image has the same number of tokens, in raster order."""

    model_type = "llava"
    towers = {**TOWERS, "pixtral": False}

    def __new__(cls, model: Any = None) -> Any:  # None where one is copied
        vision = getattr(getattr(model, "config", None), "vision_config", None)
        own = cls is Llava and getattr(vision, "model_type", None) == "pixtral"
        return _LlavaPixtral(model) if own else super().__new__(cls)

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


class _LlavaPixtral(Pixtral):
    """The same class of model with a Pixtral tower: every patch is a token."""

    model_type = "llava"

    def __init__(self, model: Any) -> None:
        strategy = model.config.vision_feature_select_strategy
        if strategy != "full":
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} with a 'pixtral' tower drops the first patch; use 'full'"
            )
        super().__init__(model, merge=1)
