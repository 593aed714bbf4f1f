"""Decoders of the Llama kind."""

from __future__ import annotations

from typing import Any

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.shapes import Layers

# A layer is four attention matrices and a gated MLP of three, or a mixture of such; norms on q and k cost nothing here.
DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma")


def decoder(config: Any) -> Layers:
    """A Llama-like decoder: grouped-query attention and a gated MLP or a mixture of them, as all supported families
    have that bring their own. Experts that a token is not sent to cost it nothing."""
    if config.model_type not in DECODERS and config.model_type.removesuffix("_text") not in registry.adapters():
        raise UnsupportedError(
            f"no FLOPs account for a decoder of type {config.model_type!r}; supported: {', '.join(DECODERS)}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    width, depth = config.hidden_size, config.num_hidden_layers
    attention = 2 * width * head_dim * (heads + kv_heads)
    weights = [attention + _mlp(config, layer) for layer in range(depth)]
    unlike = {layer: n for layer, n in enumerate(weights) if n != weights[-1]}
    # The window of every layer, as transformers' DynamicCache reads it from the config.
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
    windows = tuple(window if kind == "sliding_attention" else None for kind in types)
    return Layers(depth, width, weights[-1], heads, kv_heads, head_dim, windows, unlike)


def _mlp(config: Any, layer: int) -> int:
    """Numbers in a layer's MLP that one token meets: of a mixture the router, the experts it is sent to, the shared."""
    experts = getattr(config, "num_local_experts", 0)
    dense = (
        layer in (getattr(config, "mlp_only_layers", None) or ())
        or (layer + 1) % getattr(config, "decoder_sparse_step", 1)
        or layer < getattr(config, "first_k_dense_replace", 0)
    )
    if not experts or dense:
        return int(3 * config.hidden_size * config.intermediate_size)
    met = config.num_experts_per_tok + getattr(config, "n_shared_experts", 0)
    return int(config.hidden_size * (experts + 3 * met * config.moe_intermediate_size))
