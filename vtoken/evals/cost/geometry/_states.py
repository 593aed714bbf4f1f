"""Decoders in which most layers keep a state (gated delta rule) instead of attending."""

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


def _mlp(config: Any) -> int:
    """Numbers in a layer's MLP that one token meets: of a mixture the router, the experts it is sent to, the shared one
    and its gate."""
    if not hasattr(config, "moe_intermediate_size"):
        return int(3 * config.hidden_size * config.intermediate_size)
    met = config.num_experts_per_tok * config.moe_intermediate_size + config.shared_expert_intermediate_size
    return int(config.hidden_size * (config.num_experts + 3 * met + 1))
