"""What LLaVA-1.5, NeXT and OneVision share: a CLIP or SigLIP tower over equal crops, an MLP projector, a decoder of the
Llama kind."""

from __future__ import annotations

from typing import Any, ClassVar

from vtoken.adapters.base import Adapter, Encoder, check_decoder
from vtoken.errors import UnsupportedError

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}


class Padded(Adapter):
    """Finds tower, projector and decoder; `side` is the number of patches along a crop's edge."""

    expects: ClassVar[str]

    def __init__(self, model: Any) -> None:
        config = model.config
        if not hasattr(getattr(model, "model", None), "multi_modal_projector"):
            raise UnsupportedError(
                f"expected a {self.expects}, got {type(model).__name__}; wrap the whole VLM, model and not model.model"
            )
        vision = config.vision_config
        if vision.model_type not in TOWERS:
            raise UnsupportedError(
                f"{self.model_type} with a {vision.model_type!r} vision tower is not supported; supported towers: "
                f"{', '.join(TOWERS)}"
            )
        self.model = model
        self.outer = model.model
        self.lm, self.tower = self.outer.language_model, self.outer.vision_tower
        self.projectors = (self.outer.multi_modal_projector,)
        check_decoder(self.lm)
        cls = TOWERS[vision.model_type]
        strategy = config.vision_feature_select_strategy
        if cls != (strategy == "default"):
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} with a {vision.model_type!r} tower "
                f"{'keeps the CLS token among the patches' if cls else 'drops the first patch'}; use "
                f"{'default' if cls else 'full'!r}"
            )
        depth = vision.num_hidden_layers
        self.config_layer = config.vision_feature_layer
        chosen = [self.config_layer] if isinstance(self.config_layer, int) else list(self.config_layer)
        # hidden_states[0] is the embedding, so entry h is the output of layer h - 1.
        features = tuple(h - 1 if h >= 0 else depth + h for h in chosen)
        if min(features) < 0 or max(features) >= depth:
            raise UnsupportedError(
                f"vision_feature_layer={self.config_layer} is not the output of one of the tower's {depth} layers"
            )
        nested = getattr(self.tower, "vision_model", self.tower)
        attention = nested.encoder.layers[0].self_attn
        self.encoder = Encoder(
            layers=nested.encoder.layers,
            heads=attention.num_heads,
            scale=attention.head_dim**-0.5,
            cls=cls,
            feature_layers=features,
            attention_layer=max(features),
        )
        self.placeholders = {"image": config.image_token_id}
        self.side = vision.image_size // vision.patch_size
        self.patches = self.side**2
        self.missing = {}

    def check_call(self, kwargs: dict[str, Any]) -> None:
        # The model is told the layer; from 5.18 on the tower is too, as the one hidden state to return.
        for asked in (kwargs.get("vision_feature_layer"), kwargs.get("output_hidden_states")):
            if type(asked) in (int, list) and asked != self.config_layer:
                raise UnsupportedError(
                    f"vision_feature_layer={asked} at call time differs from the config's {self.config_layer}, which "
                    "the stages were set up for; set it in the config before wrapping"
                )
