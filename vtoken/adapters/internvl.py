"""InternVL: crops and a thumbnail of every picture through InternViT, 2 x 2 patches shuffled into a token, and any
decoder of the Llama kind."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._crops import picture, single_crops
from vtoken.adapters._padded import check_feature_layer, feature_layers
from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout, runs


class InternVL(Adapter):
    """`InternVLForConditionalGeneration`. The thumbnail is the last crop of a picture; frames of a video are pictures.

    Pixels do not tell which crops are of one picture, but the prompt does: their tokens stand side by side.
    """

    model_type = "internvl"
    prompted = True

    def __init__(self, model: Any) -> None:
        self.find(model)
        config, vision = model.config, model.config.vision_config
        kinds = vision.model_type, config.vision_feature_select_strategy
        if kinds != ("internvl_vision", "default"):
            raise UnsupportedError(
                f"internvl with a {kinds[0]!r} vision tower and vision_feature_select_strategy={kinds[1]!r} is not "
                "supported; the tower must be 'internvl_vision' and the strategy 'default', which drops the CLS token"
            )
        self.feature_layer, layers = config.vision_feature_layer, self.tower.encoder.layer
        features = feature_layers(self.feature_layer, len(layers))
        (height, width), (down, across) = vision.image_size, vision.patch_size
        self.side, join = height // down, round(1 / config.downsample_ratio)
        if len(features) != 1 or self.side != width // across or self.side % join:
            raise UnsupportedError(
                f"internvl with vision_feature_layer={self.feature_layer}, crops of {self.side} x {width // across} "
                f"patches and downsample_ratio={config.downsample_ratio} is not supported; one layer of the tower, "
                "square crops and whole units are"
            )
        taps = {"q": "q_norm", "k": "k_norm", "v": "v_proj"}
        self.encoder = Encoder.of(
            layers, features, attention="attention", cls=True, unit=join**2, taps=taps, takes_mask=False
        )
        self.projectors, self.size = (self.outer.multi_modal_projector,), (height, width)
        self.patches, self.side = self.side**2, self.side // join
        self.placeholders = {"image": config.image_token_id}

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        pixels, each = arguments["pixel_values"], self.side**2
        if tuple(pixels.shape[2:]) != self.size:
            raise ValueError(
                f"internvl needs pixel_values [crops, 3, {self.size[0]}, {self.size[1]}] to encode, got "
                f"{list(pixels.shape)}; give the processor the size of the model's vision_config.image_size"
            )
        many = len(pixels)
        ids, embeds = (arguments.get(name) for name in ("input_ids", "inputs_embeds"))
        found = [] if ids is None and embeds is None else runs(self.visual_kinds(ids, embeds))
        fits = sum(found) == many * each and not any(n % each for n in found)
        return [n // each for n in found] if fits else [1] * many

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        return tuple(picture(n, self.side) for n in self.crops(arguments))

    def split(self, tokens: int) -> tuple[ImageLayout, ...]:
        return single_crops(tokens, self.side)

    def check_call(self, kwargs: dict[str, Any]) -> None:
        check_feature_layer(kwargs, self.feature_layer)
