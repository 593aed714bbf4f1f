"""What the LLaVA families and DeepSeek-VL share: a CLIP or SigLIP tower over equal crops, an MLP projector, a decoder
of the Llama kind."""

from __future__ import annotations

from typing import Any, ClassVar

from vtoken.adapters.base import Adapter, Encoder
from vtoken.errors import UnsupportedError

TOWERS = {"clip_vision_model": True, "siglip_vision_model": False}


class Padded(Adapter):
    """Finds tower, projector and decoder; `side` is the number of patches along a crop's edge.

    `towers`: supported types of tower -> whether they have a CLS token; `tower_name`, `projector_name`: names of the
    tower for pictures and of its projector in `outer`.
    """

    towers: ClassVar[dict[str, bool]] = TOWERS
    tower_name: ClassVar[str] = "vision_tower"
    projector_name: ClassVar[str] = "multi_modal_projector"

    def __init__(self, model: Any) -> None:
        config = model.config
        self.find(model, tower=self.tower_name)
        vision = config.vision_config
        if vision.model_type not in self.towers:
            raise UnsupportedError(
                f"{self.model_type} with a {vision.model_type!r} vision tower is not supported; supported towers: "
                f"{', '.join(self.towers)}"
            )
        self.projectors = (getattr(self.outer, self.projector_name),)
        cls = self.towers[vision.model_type]
        self.config_layer, strategy = self.selected(config)
        if cls != (strategy == "default"):
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} with a {vision.model_type!r} tower "
                f"{'keeps the CLS token among the patches' if cls else 'drops the first patch'}; use "
                f"{'default' if cls else 'full'!r}"
            )
        features = feature_layers(self.config_layer, vision.num_hidden_layers)
        self.encoder = Encoder.of(layers_of(self.tower), features, cls=cls)
        self.placeholders = {"image": config.image_token_id}
        self.side = vision.image_size // vision.patch_size
        self.patches = self.side**2

    def selected(self, config: Any) -> tuple[int | list[int], str]:
        """Which of the tower's hidden states become features, and `vision_feature_select_strategy`."""
        layer = config.vision_feature_layer
        return layer if isinstance(layer, int) else list(layer), config.vision_feature_select_strategy

    def check_call(self, kwargs: dict[str, Any]) -> None:
        check_feature_layer(kwargs, self.config_layer)


def layers_of(tower: Any) -> Any:
    """The transformer layers of a CLIP or SigLIP tower."""
    return getattr(tower, "vision_model", tower).encoder.layers


def feature_layers(chosen: int | list[int], depth: int) -> tuple[int, ...]:
    """Indices of the layers that output the hidden states `chosen` of a tower of `depth` layers.

    Raises:
        UnsupportedError: a hidden state that is no layer's output.
    """
    each = [chosen] if isinstance(chosen, int) else chosen
    # hidden_states[0] is the embedding, so entry h is the output of layer h - 1.
    features = tuple(h - 1 if h >= 0 else depth + h for h in each)
    if min(features) < 0 or max(features) >= depth:
        raise UnsupportedError(f"vision_feature_layer={chosen} is not the output of one of the tower's {depth} layers")
    return features


def check_feature_layer(kwargs: dict[str, Any], chosen: int | list[int]) -> None:
    """Refuses arguments of a call of the model or its tower that name other hidden states than the config's.

    Raises:
        UnsupportedError: names both.
    """
    # The model gets the layer; from 5.18 on the tower does too, as the one hidden state to return.
    for asked in map(kwargs.get, ("vision_feature_layer", "vision_feature_layers", "output_hidden_states")):
        if type(asked) in (int, list, tuple) and (list(asked) if isinstance(asked, tuple) else asked) != chosen:
            raise UnsupportedError(
                f"vision_feature_layer={asked} at call time differs from the config's {chosen}, which the stages were "
                "set up for; set it in the config before wrapping"
            )
