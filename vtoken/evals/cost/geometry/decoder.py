"""Decoders: of the Llama kind, and those in which most layers keep a state instead of attending."""

from __future__ import annotations

from typing import Any

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.shapes import Layers, State

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "lfm2")


def decoder(config: Any) -> Layers:
    """Grouped-query attention, a gated delta rule or a short convolution, as `layer_types` says, and a gated MLP or a
    mixture of them. Experts that a token is not sent to cost it nothing, nor do norms.

    Raises:
        UnsupportedError: a type that is neither in `DECODERS` nor of a supported family.
    """
    if config.model_type not in DECODERS and config.model_type.removesuffix("_text") not in registry.adapters():
        raise UnsupportedError(
            f"no FLOPs account for a decoder of type {config.model_type!r}; supported: {', '.join(DECODERS)}"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    width, depth = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or width // heads
    # The window of every layer, as transformers' DynamicCache reads it from the config.
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * depth
    states, weights = {}, []
    for layer, kind in enumerate(kinds):
        if kind == "linear_attention":
            states[layer], mixer = _delta_rule(config)
        elif kind == "conv":
            states[layer], mixer = State(width * config.conv_L_cache, config.conv_L_cache), 4 * width**2
        else:
            # Beside a delta rule attention has a gate as wide as the queries.
            gate = heads if "linear_attention" in kinds else 0
            mixer = width * head_dim * (2 * heads + 2 * kv_heads + gate)
        weights.append(mixer + _mlp(config, layer))
    windows = tuple(window if kind == "sliding_attention" else None for kind in kinds)
    return Layers(depth, width, tuple(weights), heads, kv_heads, head_dim, windows, states)


def _delta_rule(config: Any) -> tuple[State, int]:
    """What a layer with Qwen3.5's gated delta rule computes, and the numbers in its matrices."""
    heads, taps = config.linear_num_value_heads, config.linear_conv_kernel_dim
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = heads * config.linear_value_head_dim
    state = State((2 * keys + values) * taps, taps, heads, config.linear_key_head_dim, config.linear_value_head_dim)
    # q, k and v; the gate; decay and strength of every head; the way out.
    return state, config.hidden_size * (2 * keys + 3 * values + 2 * heads)


def _mlp(config: Any, layer: int) -> int:
    """Numbers in a layer's MLP that one token meets: of a mixture the router, the experts it is sent to, the shared
    ones and, where these are one with a gate, that."""
    experts = getattr(config, "num_local_experts", 0) or getattr(config, "num_experts", 0)
    dense = (
        layer in (getattr(config, "mlp_only_layers", None) or ())
        or (layer + 1) % getattr(config, "decoder_sparse_step", 1)
        or layer < getattr(config, "first_k_dense_replace", 0)
    )
    if not experts or dense:
        return int(3 * config.hidden_size * _channels(config))
    gated = getattr(config, "shared_expert_intermediate_size", 0)
    met = config.num_experts_per_tok + getattr(config, "n_shared_experts", 0)
    return int(config.hidden_size * (experts + 3 * (met * config.moe_intermediate_size + gated) + bool(gated)))


def _channels(config: Any) -> int:
    """Of an MLP, as LFM2 adjusts them."""
    channels: int = config.intermediate_size
    if getattr(config, "block_auto_adjust_ff_dim", False):
        channels = int(2 * channels / 3)
        if config.block_ffn_dim_multiplier is not None:
            step = config.block_multiple_of
            channels = -(-int(config.block_ffn_dim_multiplier * channels) // step) * step
    return channels
