"""Decoders in which most layers keep a state (gated delta rule, short convolutions) instead of attending."""

from __future__ import annotations

from typing import Any

from vtoken.evals.cost.geometry.shapes import Layers, State


def delta_rule(config: Any) -> Layers:
    """Qwen3.5's decoder: attention with a gate as wide as the queries, gated delta rule, an MLP or a mixture. Experts
    that a token is not sent to cost it nothing."""
    width, depth, heads, kv_heads = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    values = config.linear_num_value_heads * config.linear_value_head_dim
    # q, k and v; the gate; decay and strength of every head; the way out.
    linear = width * (2 * keys + 3 * values + 2 * config.linear_num_value_heads)
    attention = width * config.head_dim * (3 * heads + 2 * kv_heads)
    taps = config.linear_conv_kernel_dim
    state = State(
        (2 * keys + values) * taps,
        taps,
        config.linear_num_value_heads,
        config.linear_key_head_dim,
        config.linear_value_head_dim,
    )
    states = {k: state for k, kind in enumerate(config.layer_types) if kind == "linear_attention"}
    mlp = _mlp(config)
    return Layers(
        depth,
        width,
        attention + mlp,
        heads,
        kv_heads,
        config.head_dim,
        windows=(None,) * depth,
        unlike=dict.fromkeys(states, linear + mlp),
        states=states,
    )


def short_convolutions(config: Any) -> Layers:
    """LFM2's decoder: a convolution over time between two gates, or attention, and a gated MLP."""
    width, depth, heads, kv_heads = (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    head_dim = width // heads
    mlp = 3 * width * _adjusted(config)
    taps = config.conv_L_cache
    states = {k: State(width * taps, taps) for k, kind in enumerate(config.layer_types) if kind == "conv"}
    return Layers(
        depth,
        width,
        2 * width * head_dim * (heads + kv_heads) + mlp,
        heads,
        kv_heads,
        head_dim,
        windows=(None,) * depth,
        unlike=dict.fromkeys(states, 4 * width**2 + mlp),
        states=states,
    )


def _adjusted(config: Any) -> int:
    """Channels of an LFM2 decoder's MLP, as the model rounds them."""
    channels: int = config.intermediate_size
    if config.block_auto_adjust_ff_dim:
        channels = int(2 * channels / 3)
        if config.block_ffn_dim_multiplier is not None:
            step = config.block_multiple_of
            channels = -(-int(config.block_ffn_dim_multiplier * channels) // step) * step
    return channels


def _mlp(config: Any) -> int:
    """Numbers in a layer's MLP that one token meets: of a mixture the router, the experts it is sent to, the shared one
    and its gate."""
    if not hasattr(config, "moe_intermediate_size"):
        return int(3 * config.hidden_size * config.intermediate_size)
    met = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return int(config.hidden_size * (config.num_experts + 3 * met + 1))
