"""How an attention of the decoder rotates its queries and keys: by which function, by which angles, and whether last
of all."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager, steps
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.run import Run
from vtoken.stages import Stage
from vtoken.stages.attention import Rope

# What an attention is, and may be, built of for its queries and keys to be rotated last of all.
PARTS = {"q_proj", "k_proj", "v_proj"}
NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}
BUILT = "q_proj, k_proj and v_proj, norms of queries and keys, then apply_rotary_pos_emb"


def rotation_of(attention: Any) -> Any:
    """The function by which an attention rotates its queries and keys, as its file defines it; None if it defines
    none."""
    return getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)


def rotates_last(attention: Any) -> bool:
    """Whether an attention is q_proj, k_proj and v_proj, norms of queries and keys, then `apply_rotary_pos_emb` of its
    file."""
    parts = {name for name, _ in attention.named_children()}
    built = PARTS < parts and (parts - PARTS - NORMS in ({"o_proj"}, {"out_proj"}))
    return built and rotation_of(attention) is not None and bool(getattr(attention, "use_rope", True))


def check_undone(stage: Stage, attention: Any) -> None:
    """Refuses a stage that undoes the rotation of an attention in which it may not be the last step.

    Raises:
        UnsupportedError: names the stage and the attention.
    """
    if not rotates_last(attention):
        raise UnsupportedError(
            f"stage {stage.name} needs queries and keys from before RoPE, and {type(attention).__name__} is not "
            f"{BUILT}; take another stage of site {stage.site}"
        )


def watch_inputs(context: Context, layers: Iterable[int]) -> None:
    """Notes the hidden states and the RoPE that the attention of these layers is given in a prefill, as
    `GroupNotes.layer_input`."""
    for layer in layers:
        context.handle.before(context.lm.layers[layer].self_attn, partial(_before, context.run))


def _before(run: Run, module: nn.Module, args: tuple, kwargs: dict) -> None:
    hidden = args[0] if args else kwargs["hidden_states"]
    if not steps(hidden, kwargs.get(CACHE)):
        _note(run, hidden, kwargs["position_embeddings"])


@eager
def _note(run: Run, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> None:
    if isinstance(run.flow, PrefillState):
        run.flow.notes.layer_input = hidden, rope


def rope_of(flow: PrefillState, attention: Any, row: int, here: slice, device: torch.device) -> Rope:
    """How an attention rotated what stands in these slots of a row; see `watch_inputs`."""
    assert flow.notes.layer_input is not None
    cos, sin = (t[row if len(t) > 1 else 0, here].to(device) for t in flow.notes.layer_input[1])
    return Rope(cos, sin, rotation_of(attention))
