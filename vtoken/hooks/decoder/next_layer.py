"""What the last prompt token will attend to in a decoder layer that has not run yet."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.attention_facts import LayerAttention, attention_of_text, last_row
from vtoken.hooks.decoder.rotation import rotation_of
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
        not (known and entering_norm(layer) and rotation_of(attention))
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
    rotate = rotation_of(attention)
    x = entering_norm(layer)(hidden.detach())
    asking, cos, sin = (each if text else flow.of_last(each, 1)[:, None] for each in (x, *rope))
    q = _heads(attention, "q", asking, gated=adapter.gated_queries)
    keys = _heads(attention, "k", x)
    # One call rotates queries and keys by the same positions; these have their own.
    q, keys = rotate(q, q, cos, sin)[0], rotate(keys, keys, *rope)[0]
    key_mask = flow.valid.to(keys.device) & ~dropped_slots(flow).to(keys.device)
    if isinstance(flow.cache, PrunedCache) and flow.past:
        logical, real = flow.cached_rows(k)
        # A layer with a sliding window may hold the last slots alone.
        old = flow.cache.layers[k].keys[:, :, : logical.shape[1]]  # type: ignore[attr-defined]
        keys = torch.cat([old, keys], 2)
        key_mask = torch.cat([real[:, -old.shape[2] :].to(key_mask.device), key_mask], 1)
    scale, window = getattr(attention, "scaling", None) or attention.head_dim**-0.5, window_of(adapter.lm.config, k)
    if text:
        return attention_of_text(LayerAttention(flow, q, keys, keys, key_mask, scale, window))
    return last_row(flow, q[:, :, 0], keys, key_mask, scale, window)


def _heads(attention: Any, name: str, x: Tensor, *, gated: bool = False) -> Tensor:
    """[B, H, P, d] projection q or k of x [B, P, D]; of a gated one each head's second half is the gate."""
    out = getattr(attention, f"{name}_proj")(x).unflatten(-1, (-1, attention.head_dim * (1 + gated)))
    out = out[..., : attention.head_dim]
    norm = norm_of(attention, name)
    return (out if norm is None else norm(out)).transpose(1, 2)


def entering_norm(layer: Any) -> Any:
    """What a decoder layer's attention is given its hidden states through; None where it has another name."""
    return getattr(layer, "input_layernorm", None) or getattr(layer, "operator_norm", None)
