"""What a family has to say about itself. Everything that is the same in all families lives in `vtoken.hooks`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.layer_kinds import FULL, SLIDING, kinds_of
from vtoken.hooks.state.run import KINDS, FeatureCall, ImageLayout, pixels_of
from vtoken.stages import FACTS, uploaded

# Attention, full or in sliding windows; layers that use no positions, to which a pruned prompt is a short one.
KINDS_OF_LAYERS = {FULL, SLIDING, "linear_attention", "conv"}


@dataclass(frozen=True)
class Encoder:
    """Where a vision tower keeps its parts.

    Attributes:
        layers: its transformer layers.
        heads: attention heads; `scale` multiplies q k^T.
        cls: whether column 0 is a CLS token (padded towers).
        feature_layers: indices of the layers whose outputs become the visual features.
        attention_layer: the layer that attention facts and keys are read from unless a stage names one.
        full_attention: layers in which every token of an image (or frame) attends to all others; None: all of them.
        packed: whether the patches of all images lie in one sequence, merge group by merge group (Qwen) or row by row
            (`by_rows`, `by_grids`); else every crop is a row of a batch.
        by_rows: of packed towers, that every image lies in it row by row, and a mask keeps images apart (Pixtral).
        by_grids: of packed towers, that every image lies in it row by row, and a projector joins patches by the grids
            of the images (PaddleOCR-VL).
        sized: of padded towers, that crops have sizes of their own and are padded to a common length, with a mask
            over the padding (NaFlex).
        unit: patches that become one visual token; in padded towers a square of neighbours.
        attention: name of a layer's attention; taps: names in it of what gives q, k and v (padded, and row by row).
        takes_mask: whether the layer takes the attention mask; else its attention takes it (padded towers).
        twins: further towers of the same build, each with its layers, where images and videos have a tower each.
    """

    layers: Sequence[Any]
    heads: int
    scale: float
    feature_layers: tuple[int, ...]
    attention_layer: int
    cls: bool = False
    full_attention: tuple[int, ...] | None = None
    packed: bool = False
    by_rows: bool = False
    by_grids: bool = False
    sized: bool = False
    unit: int = 1
    attention: str = "self_attn"
    taps: Mapping[str, str] = field(default_factory=lambda: {"q": "q_proj", "k": "k_proj", "v": "v_proj"})
    takes_mask: bool = True
    twins: tuple[tuple[Any, Sequence[Any]], ...] = ()

    @staticmethod
    def of(
        layers: Sequence[Any], features: tuple[int, ...] = (), attention: str = "self_attn", **parts: Any
    ) -> Encoder:
        """The encoder with these layers, whose attention has num_heads and head_dim. `features`: feature_layers, by
        default the last layer; attention facts are read from the last of them unless `parts` names a layer."""
        features, first = features or (len(layers) - 1,), getattr(layers[0], attention)
        parts = {"attention_layer": max(features), "attention": attention, **parts}
        return Encoder(layers, first.num_heads, first.head_dim**-0.5, features, **parts)

    @property
    def width(self) -> int:
        """Channels of the keys of all heads."""
        return self.heads * round(self.scale**-2)


class Adapter(ABC):
    """One family. Constructing it finds the modules, or raises UnsupportedError with the reason.

    Attributes:
        model: the wrapped model.
        outer: the module whose forward sees `input_ids` and the features together.
        lm: the language model, whose inputs are shortened.
        tower: the vision encoder.
        projectors: the modules that bring its features to the LLM's width; the first makes the visual tokens.
        resampler: the module that pools patches by their place before the projector, if there is one (padded towers).
        encoder: the tower's parts.
        patches: patches per crop, CLS not counted (padded towers).
        behind: the module that takes the patches [P, C] from the last layer (packed towers).
        stack: the module that runs the layers (padded towers of crops of their own size).
        placeholders: kind ("image", "video") -> id that stands for its tokens in a prompt. Where two kinds have one id,
            what was encoded tells them apart.
        embedded: kind -> id whose embedding stands for its tokens in a prompt without ids.
        features: kind -> name of the method of `outer` that encodes it.
        missing: fact name -> why the family cannot supply it and what comes nearest; none by default.
        mrope: whether positions have several axes, which cannot be renumbered.
        masks_outside: whether `outer` makes the masks that `lm` is called with.
        both_ways: whether the tokens of an image may see each other both ways, see `blocks`.
        prompted: whether `layouts` and `crops` are given `input_ids` or `inputs_embeds` of the prompt too, where there
            is one.
        gated_queries: whether the decoder's q_proj gives each head's query and, after it, a gate of the same width.
        final_norm: the decoder's name for its last norm.
    """

    model_type: ClassVar[str]
    features: ClassVar[dict[str, str]] = {"image": "get_image_features"}
    mrope: ClassVar[bool] = False
    masks_outside: ClassVar[bool] = False
    both_ways: ClassVar[bool] = False
    prompted: ClassVar[bool] = False
    gated_queries: ClassVar[bool] = False
    final_norm: ClassVar[str] = "norm"
    missing: ClassVar[Mapping[str, str]] = {}
    model: Any
    outer: Any
    lm: Any
    tower: Any
    projectors: tuple[Any, ...]
    behind: Any
    stack: Any
    resampler: Any = None
    encoder: Encoder
    patches: int
    placeholders: dict[str, int]

    @abstractmethod
    def __init__(self, model: Any) -> None: ...

    @cached_property
    def embedded(self) -> dict[str, int]:
        return self.placeholders

    @cached_property
    def substitutes(self) -> dict[str, str]:
        """Fact name -> the fact that is given in its place."""
        return {} if self.encoder.cls else {spec.name: spec.instead for spec in FACTS if spec.instead}

    @cached_property
    def attending(self) -> tuple[int, ...]:
        """Decoder layers with attention and a KV cache. The others (linear attention, short convolutions) fold what
        they see into a state of fixed size."""
        return tuple(k for k, layer in enumerate(self.lm.layers) if hasattr(layer, "self_attn"))

    @abstractmethod
    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        """How each image or video of a call of the feature function will reach the language model.

        Args:
            arguments: of the call, by name; those not given are absent.

        Raises:
            ValueError: pixels that do not fit their sizes.
        """

    def pack(self, call: FeatureCall, values: Tensor) -> Tensor:
        """Brings tower values to the order and number of the packed visual tokens, newlines left out, by the same
        operations that the model applies to its features.

        Args:
            values: [crops, patches / unit, C] (CLS dropped), or [ΣN, C] from a packed tower; NaN marks what was
                dropped.

        Returns:
            [ΣN, C].
        """
        return values.flatten(0, -2)

    def find(self, model: Any, *, decoder: str = "language_model", tower: str = "vision_tower") -> None:
        """Sets `model`, `outer`, `lm` and `tower`.

        Args:
            decoder, tower: their names in `model.model`.

        Raises:
            UnsupportedError: not the whole VLM, or a decoder of another kind.
        """
        outer: Any = getattr(model, "model", None)
        if not (hasattr(outer, decoder) and hasattr(outer, tower)):
            raise UnsupportedError(
                f"expected a {self.model_type} model with its language-model head (…ForConditionalGeneration), got "
                f"{type(model).__name__}; wrap the whole VLM, model and not model.model"
            )
        self.model, self.outer = model, outer
        self.lm, self.tower = getattr(outer, decoder), getattr(outer, tower)
        check_decoder(self.lm)

    def crops(self, arguments: dict[str, Any]) -> list[int]:
        """Crops per image of a call of the feature function (padded towers)."""
        return [1] * len(pixels_of("image", arguments))

    def rasters(self, grid: Sequence[Sequence[int]]) -> tuple[ImageLayout, ...]:
        """The layout of each row of `grid` [images, 3]: frames, rows and columns in patches (towers of variable
        length)."""
        raise NotImplementedError(f"{self.model_type}: define rasters()")

    def order(self, grid: Tensor, arguments: dict[str, Any]) -> Tensor | None:
        """[ΣN] which token each merge group of the tower's sequence becomes; None where it is the same order (towers of
        variable length).

        Args:
            grid: [images, 3] frames, rows and columns in patches; arguments: of the tower call, by name.
        """
        return None

    def split(self, tokens: int) -> tuple[ImageLayout, ...]:
        """Layouts of the images that fill `tokens` placeholders of one row, when no encoder call tells their sizes.

        Raises:
            UnsupportedError: the number of tokens does not tell how many images they are.
            ValueError: the tokens are not a whole number of images.
        """
        raise UnsupportedError(
            f"{self.model_type} was given visual features that were not encoded while the model was wrapped, so their "
            "grids are not known; pass pixel_values, or call the model's feature function after vtoken.wrap"
        )

    def check_call(self, kwargs: dict[str, Any]) -> None:  # noqa: B027
        """Refuses arguments of a call of `outer` or the tower that change which layer the features come from."""

    def blocks(self, kwargs: dict[str, Any]) -> Tensor | None:
        """[B, L] of a call of `outer`: tokens with the same number see each other both ways, those with -1 do not;
        None: none do."""
        return None

    def visual_kinds(self, ids: Tensor | None, embeds: Tensor | None, among: Collection[str] = KINDS) -> Tensor:
        """[B, L] uint8: 1 where a position holds an image token, 2 for video, 0 for text. Without ids the placeholder's
        embedding is looked for, as upstream. Placeholders of kinds that are not `among` these are text."""
        given = embeds if ids is None else ids
        assert given is not None
        kinds: Tensor | None = None
        looked_for = set()
        for kind, placeholder in (self.embedded if ids is None else self.placeholders).items():
            if kind not in among or placeholder in looked_for:
                continue
            looked_for.add(placeholder)
            if ids is not None:
                here = ids == placeholder
            else:
                row = self.outer.get_input_embeddings()(uploaded([placeholder], given.device))
                here = (given == row).all(-1)
            code = 1 + KINDS.index(kind)
            marked = here.to(torch.uint8) if code == 1 else here * torch.tensor(code, dtype=torch.uint8)
            kinds = marked if kinds is None else kinds + marked
        return torch.zeros(given.shape[:2], dtype=torch.uint8, device=given.device) if kinds is None else kinds


def check_decoder(lm: Any) -> None:
    """Refuses decoders whose layers would compute something else with tokens dropped, or whose attention the facts do
    not model.

    Raises:
        UnsupportedError: chunked or otherwise unusual layers, capped logits or sinks in attention, queries scaled by
            position, layers that are not of the Llama kind.
    """
    config = lm.config
    kinds = set(kinds_of(config)) - KINDS_OF_LAYERS
    if kinds:
        raise UnsupportedError(
            f"decoder {config.model_type!r} has layers of kind {', '.join(sorted(kinds))}; vtoken handles full "
            "attention, sliding windows and layers that keep a state: with tokens dropped, a chunk would span other "
            "tokens than it was "
            "trained on"
        )
    if getattr(config, "attn_logit_softcapping", None):
        raise UnsupportedError(
            f"decoder {config.model_type!r} caps the logits of its attention, which facts about attention do not "
            "reckon with; not supported"
        )
    if any(hasattr(getattr(layer, "self_attn", None), "sinks") for layer in getattr(lm, "layers", ())):
        raise UnsupportedError(
            f"decoder {config.model_type!r} has sinks in its attention, learned logits beside those of the keys, which "
            "facts about attention do not reckon with; not supported"
        )
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict) and rope.get("llama_4_scaling_beta"):
        raise UnsupportedError(
            f"decoder {config.model_type!r} scales its queries by their position, which stages inside the decoder do "
            "not: not supported"
        )
    if not any(hasattr(layer, "self_attn") for layer in getattr(lm, "layers", ())) or not hasattr(lm, "rotary_emb"):
        raise UnsupportedError(
            f"decoder {config.model_type!r} is not of the Llama kind (layers[i].self_attn, rotary_emb): not supported"
        )
