"""Decoder layers by what they see: the whole prompt, or a sliding window of it. Each kind has masks, and may have RoPE,
of its own."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.cache_argument import causal_mask

FULL, SLIDING = "full_attention", "sliding_attention"


def kinds_of(config: Any) -> tuple[str, ...]:
    """The kind of every layer of a decoder, as its config names them."""
    types = getattr(config, "layer_types", None)
    if types is not None:
        return tuple(types)
    slides = getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True)
    return (SLIDING if slides else FULL,) * config.num_hidden_layers


def window_of(config: Any, layer: int) -> int | None:
    """Tokens that a query of the layer sees, itself among them; None: all up to itself."""
    window: int | None = config.sliding_window if kinds_of(config)[layer] == SLIDING else None
    return window


def other_kinds(cache: Any, attending: Collection[int], served: Sequence[type] = (DynamicLayer,)) -> str:
    """Class names of cache layers, of decoder layers with attention, that are not among `served`; "" without any."""
    layers = [layer for k, layer in enumerate(cache.layers) if k in attending]
    return ", ".join(sorted({type(layer).__name__ for layer in layers if type(layer) not in served}))


def heads_in(config: Any) -> tuple[int, int, int]:
    """Query heads and key heads of a decoder layer, and their width."""
    heads = config.num_attention_heads
    return heads, config.num_key_value_heads, getattr(config, "head_dim", None) or config.hidden_size // heads


def windows_go_back() -> bool:
    """Whether a sliding window that keeps its past (so that drafts can be taken back) returns, after several steps in a
    row, no more tokens than its mask is made for; that of transformers 5.17 returns more."""
    layer, step = DynamicSlidingWindowLayer(2), torch.zeros(1, 1, 3, 1)
    layer.activate_past_recording()
    layer.update(step, step)
    return int(layer.update(step[:, :, :1], step[:, :, :1])[0].shape[2]) == layer.sliding_window


def firsts(config: Any) -> dict[str, int]:
    """Kind -> its first layer."""
    kinds = kinds_of(config)
    return {kind: kinds.index(kind) for kind in dict.fromkeys(kinds)}


def rotary(lm: Any, layer: int, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of these positions, as the layer takes them."""
    kind = [kinds_of(lm.config)[layer]] if "layer_type" in inspect.signature(lm.rotary_emb.forward).parameters else []
    cos, sin = lm.rotary_emb(hidden, positions, *kind)
    return cos, sin


def layer_mask(
    config: Any, layer: int, hidden: Tensor, key_mask: Tensor | None, cache: Any, blocks: Tensor | None = None
) -> Any:
    """The backend's mask for a layer, sized by what the cache holds of that layer alone.

    Args:
        hidden: [B, N, D] what enters the layer; key_mask: [B, slots], None: all are real.
        blocks: [B, slots] tokens of the same number see each other both ways; -1 at others.
    """
    cached = [] if cache is None else cache.layers[layer : layer + 1]
    view = Cache(layers=cached) if cached else None
    return causal_mask(config, hidden, key_mask, view, window_of(config, layer), blocks)


def layer_masks(
    config: Any, hidden: Tensor, key_mask: Tensor | None, cache: Any, blocks: Tensor | None = None
) -> dict[str, Any] | Any:
    """The mask that a decoder is given where a 2D one does not tell all: kind of layer -> mask, or the mask itself
    where the config names no kinds."""
    masks = {kind: layer_mask(config, layer, hidden, key_mask, cache, blocks) for kind, layer in firsts(config).items()}
    return masks if getattr(config, "layer_types", None) is not None else masks.popitem()[1]


def widen(cache: Any, start: int, padding: int) -> None:
    """Adds `padding` slots to every sliding window from layer `start` on, for the padding between two turns.

    Raises:
        UnsupportedError: the window is one of a static cache.
    """
    for cached in cache.layers[start:] if padding else ():
        if not getattr(cached, "is_sliding", False):
            continue
        if cache.is_compileable:
            raise UnsupportedError(
                "rows that keep different numbers of tokens in a later turn are padded between the turns, and the "
                "sliding windows of a static cache have no room for that; use a dynamic cache "
                "(cache_implementation=None), or turns of one row"
            )
        cached.sliding_window += padding
        # Slots that it has dropped come back as zeros; they are further back than any query sees.
        lost = min(cached.cumulative_length, cached.sliding_window - 1) - cached.keys.shape[2]
        cached.keys, cached.values = (F.pad(t, (0, 0, max(0, lost), 0)) for t in (cached.keys, cached.values))
