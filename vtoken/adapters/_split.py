"""What Idefics3 and SmolVLM share: a picture is cut into crops, with the whole picture after them and text between
them in the prompt; the connector joins k x k patches into a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from vtoken.adapters._crops import picture, single_crops
from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.parted import crops_of, real
from vtoken.hooks.state.run import ImageLayout


class Split(Adapter):
    """Finds tower, connector and decoder; `side` is the number of tokens along a crop's edge."""

    prompted: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.find(model, decoder="text_model", tower="vision_model")
        self.projectors = (self.outer.connector.modality_projection,)
        config, vision = model.config, model.config.vision_config
        self.encoder = Encoder.of(self.tower.encoder.layers, unit=config.scale_factor**2)
        self.placeholders = {"image": config.image_token_id}
        self.size, self.patch = vision.image_size, vision.patch_size
        self.side = self.size // self.patch // config.scale_factor
        self.patches = (self.size // self.patch) ** 2

    def check_call(self, kwargs: dict[str, Any]) -> None:
        given = kwargs.get("mm_encoder_outputs")
        if kwargs.get("image_hidden_states") is not None or torch.is_tensor(given):
            raise UnsupportedError(
                f"{self.model_type} was given image features as a tensor, which does not tell whose they are; pass "
                "pixel_values"
            )

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        pixels, each = arguments.get("pixel_values"), self.side**2
        if pixels is None or pixels.ndim != 5 or pixels.shape[-2:] != (self.size, self.size):
            raise ValueError(
                f"{self.model_type} needs pixel_values [rows, crops, 3, {self.size}, {self.size}] to encode, got "
                f"{None if pixels is None else list(pixels.shape)}; pass what its processor returns"
            )
        number = real(pixels, arguments.get("pixel_attention_mask"), self.patch)
        ids, embeds = arguments.get("input_ids"), arguments.get("inputs_embeds")
        given = embeds if ids is None else ids
        counts = [1] * number if given is None else crops_of(given, self.visual_kinds(ids, embeds), number, each)
        return tuple(picture(n, self.side) for n in counts)

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        return [len(layout.parts) for layout in self.layouts("image", arguments)]

    def split(self, tokens: int) -> tuple[ImageLayout, ...]:
        return single_crops(tokens, self.side)
