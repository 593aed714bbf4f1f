"""What the last prompt token will attend to in a decoder layer that has not run yet."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.attention_facts import last_row, mean_of_text
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import dropped_slots
from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.stages.cache import norm_of

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter


def check_next_layer(layer: Any) -> None:
    """Refuses decoder layers whose queries and keys cannot be had before they run.

    Raises:
        UnsupportedError: the layer is not built as Llama's and Qwen's are.
    """
    attention = layer.self_attn
    known = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "head_dim"))
    norms = [norm for norm in (norm_of(attention, letter) for letter in "qk") if norm is not None]
    if (
        not (known and entering_norm(layer) and hasattr(_file(attention), "apply_rotary_pos_emb"))
        or hasattr(attention, "qk_norm")
        or not getattr(attention, "use_rope", True)
        or any(norm.weight.shape != (attention.head_dim,) for norm in norms)
    ):
        raise UnsupportedError(
            f"next_query_attention cannot be computed for {type(attention).__name__}: it is not built of "
            "input_layernorm, q_proj, k_proj and apply_rotary_pos_emb; use a stage that reads last_query_attention, "
            "which any decoder has"
        )


@torch.no_grad()
def next_layer_attention(
    adapter: Adapter, k: int, flow: PrefillState, hidden: Tensor, rope: tuple[Tensor, Tensor], *, text: bool = False
) -> Tensor:
    """[B, slots] attention of the last prompt token over the slots of layer k, head mean, from the hidden states [B, P,
    D] that enter it.

    Args:
        rope: cos and sin of their positions, [B or 1, P, d].
        text: of the text behind each image instead, over that image alone, mean over it.
    """
    layer = adapter.lm.layers[k]
    attention = layer.self_attn
    rotate = _file(attention).apply_rotary_pos_emb
    x = entering_norm(layer)(hidden.detach())
    asking, turned = (x, rope) if text else (flow.of_last(x, 1)[:, None], last_of(flow, rope))
    q = _heads(attention, "q", asking, gated=adapter.gated_queries)
    keys = _heads(attention, "k", x)
    # One call rotates queries and keys by the same positions; these have their own.
    q, keys = rotate(q, q, *turned)[0], rotate(keys, keys, *rope)[0]
    key_mask = flow.valid.to(keys.device) & ~dropped_slots(flow).to(keys.device)
    past = _past(flow, k)
    if past is not None:
        old, held = past
        keys, key_mask = torch.cat([old, keys], 2), torch.cat([held.to(key_mask.device), key_mask], 1)
    scale = getattr(attention, "scaling", None) or attention.head_dim**-0.5
    if text:
        flow.window = window_of(adapter.lm.config, k)
        return mean_of_text(flow, q, keys, key_mask, scale)
    return last_row(q[:, :, 0], keys, key_mask, flow.tails, scale, window_of(adapter.lm.config, k))


def last_of(flow: PrefillState, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """cos and sin [B or 1, 1, d] of the last prompt token's position."""
    return tuple(flow.of_last(half, 1)[:, None] for half in rope)


def _past(flow: PrefillState, k: int) -> tuple[Tensor, Tensor] | None:
    """Keys [B, H, S, d] of earlier turns in layer k's cache, and which of them are real; None for a first turn."""
    if not isinstance(flow.cache, PrunedCache) or not flow.past:
        return None
    logical, held = flow.cached_rows(k)
    # A layer with a sliding window may hold the last slots alone.
    keys: Tensor = flow.cache.layers[k].keys[:, :, : logical.shape[1]]  # type: ignore[attr-defined]
    return keys, held[:, -keys.shape[2] :]


def _heads(attention: Any, name: str, x: Tensor, *, gated: bool = False) -> Tensor:
    """[B, H, P, d] projection q or k of x [B, P, D]; of a gated one each head's second half is the gate."""
    out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim * (1 + gated)))
    out = out[..., : attention.head_dim]
    norm = norm_of(attention, name)
    return (out if norm is None else norm(out)).transpose(1, 2)


def entering_norm(layer: Any) -> Any:
    """What a decoder layer's attention is given its hidden states through; None where it has another name."""
    return getattr(layer, "input_layernorm", None) or getattr(layer, "operator_norm", None)


def _file(module: Any) -> Any:
    return sys.modules[type(module).__module__]
