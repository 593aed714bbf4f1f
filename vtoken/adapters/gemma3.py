"""Gemma 3: a SigLIP tower, 4 x 4 patches averaged to a token, a decoder most of whose layers attend in sliding windows;
the tokens of an image see each other both ways."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout


class Gemma3(Adapter):
    """`Gemma3ForConditionalGeneration`. Crops (pan and scan) are images of their own, with text between them."""

    model_type = "gemma3"
    masks_outside = True
    both_ways = True

    def __init__(self, model: Any) -> None:
        self.find(model)
        config, projector = model.config, self.outer.multi_modal_projector
        self.projectors = (projector,)
        if config.text_config.use_bidirectional_attention:
            raise UnsupportedError(
                "use_bidirectional_attention lets text see what comes after it, as a model for embeddings does; vtoken "
                "prunes for models that write"
            )
        layers = getattr(self.tower, "vision_model", self.tower).encoder.layers
        self.encoder = Encoder.of(layers, unit=projector.kernel_size**2)
        self.placeholders = {"image": config.image_token_id}
        self.patches, self.side = projector.patches_per_image**2, projector.tokens_per_side

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        return (ImageLayout(((1, self.side, self.side),)),) * len(arguments["pixel_values"])

    def split(self, tokens: int) -> tuple[ImageLayout, ...]:
        images, rest = divmod(tokens, self.side**2)
        if rest:
            raise ValueError(
                f"{tokens} image placeholders are not a whole number of images of {self.side**2} tokens; "
                "is the prompt prefilled in chunks? Set prefill_chunk_size=None"
            )
        return (ImageLayout(((1, self.side, self.side),)),) * images

    def blocks(self, kwargs: dict[str, Any]) -> Tensor | None:
        types = kwargs.get("token_type_ids")
        if types is None:
            return None
        shown = types == 1
        begins = shown & ~torch.nn.functional.pad(shown, (1, 0))[:, :-1]
        given = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        found = (begins.cumsum(1) - 1).masked_fill(~shown, -1)
        return found if given is None else found[:, -given.shape[1] :]
