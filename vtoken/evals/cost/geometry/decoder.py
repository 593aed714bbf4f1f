"""Decoders of the Llama kind."""

from __future__ import annotations

from typing import Any

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.shapes import Layers

# A layer is four attention matrices and a gated MLP of three; norms on q and k cost nothing here.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def decoder(config: Any) -> Layers:
    """A Llama-like decoder: grouped-query attention and a gated MLP, as all supported families have that bring their
    own."""
    if config.model_type not in DECODERS and config.model_type.removesuffix("_text") not in registry.adapters():
        raise UnsupportedError(
            f"no FLOPs account for a decoder of type {config.model_type!r}; supported: {', '.join(DECODERS)}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, depth = config.hidden_size, config.num_hidden_layers
    weights = 2 * width * head_dim * (heads + kv_heads) + 3 * width * config.intermediate_size
    # The window of every layer, as transformers' DynamicCache reads it from the config.
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return Layers(depth, width, weights, heads, kv_heads, head_dim, windows)
