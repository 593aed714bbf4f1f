"""What a family has to say about itself. Everything that is the same in all families lives in `vtoken.hooks`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError


@dataclass(frozen=True)
class Encoder:
    """Where a padded vision tower ([crops, N, D] with an optional leading CLS) keeps its parts.

    Attributes:
        layers: its transformer layers, each with `self_attn.{q,k,v}_proj`.
        heads: attention heads; `scale` multiplies q k^T.
        cls: whether column 0 is a CLS token.
        feature_layers: indices of the layers whose outputs become the visual features.
    """

    layers: Sequence[Any]
    heads: int
    scale: float
    cls: bool
    feature_layers: tuple[int, ...]


class Adapter(ABC):
    """One family. Constructing it finds the modules, or raises UnsupportedError with the reason.

    Attributes:
        model: the wrapped model.
        outer: the module whose forward sees `input_ids` and the features together.
        lm: the language model: what it is called with is shortened.
        tower, projector: the vision encoder, and the module that brings its features to the LLM's width.
        encoder: the tower's parts.
        patches: patches per crop, CLS not counted.
        image_tokens: placeholder ids.
        missing: fact name -> why the family cannot supply it and what comes nearest.
    """

    model_type: ClassVar[str]
    model: Any
    outer: Any
    lm: Any
    tower: Any
    projector: Any
    encoder: Encoder
    patches: int
    image_tokens: tuple[int, ...]
    missing: dict[str, str]

    @abstractmethod
    def __init__(self, model: Any) -> None: ...

    @abstractmethod
    def images(self, crops: int) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
        """(lengths, grids) of the images whose crops the tower was just given: tokens in the order the LLM sees them."""

    @abstractmethod
    def split(self, tokens: int) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
        """(lengths, grids) of the images that fill `tokens` placeholders of one row, when no tower call tells.

        Raises:
            ValueError: no whole number of images fills them.
        """

    @abstractmethod
    def to_tokens(self, values: Tensor) -> Tensor:
        """[crops, N, ...] values per patch (CLS dropped) -> [ΣN, ...] in the order of the packed visual tokens."""

    @abstractmethod
    def check_call(self, kwargs: dict[str, Any]) -> None:
        """Refuses arguments of a call of `outer` or the tower that change which layer the features come from."""

    def visual_mask(self, ids: Tensor | None, embeds: Tensor | None) -> Tensor:
        """[B, L] bool: which positions hold visual features. Without ids the placeholder's embedding is looked for, as upstream."""
        if ids is not None:
            return torch.isin(ids, torch.tensor(self.image_tokens, device=ids.device))
        assert embeds is not None
        table = self.outer.get_input_embeddings()
        placeholders = table(torch.tensor(self.image_tokens, device=embeds.device))
        return (embeds[:, :, None] == placeholders).all(-1).any(-1)


def check_decoder(lm: Any) -> None:
    """Refuses decoders on which dropping tokens would change what a layer means.

    Raises:
        UnsupportedError: sliding-window, chunked, linear or otherwise unusual layers.
    """
    config = lm.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"]) - {"full_attention"}
    if kinds:
        raise UnsupportedError(
            f"decoder {config.model_type!r} has layers of kind {', '.join(sorted(kinds))}; vtoken handles full attention only: "
            "with tokens dropped, a window or state would span other tokens than it was trained on"
        )
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedError(
            f"decoder {config.model_type!r} attends in a sliding window of {config.sliding_window} tokens; dropping tokens "
            "changes what a window means. Load the model with sliding_window=None if its prompts fit the window"
        )
    layer = lm.layers[0] if len(getattr(lm, "layers", ())) else None
    if layer is None or not hasattr(layer, "self_attn") or not hasattr(lm, "rotary_emb"):
        raise UnsupportedError(
            f"decoder {config.model_type!r} is not of the Llama kind (layers[i].self_attn, rotary_emb): not supported"
        )
