"""How an attention of the decoder rotates its queries and keys: by which function, and whether last of all."""

from __future__ import annotations

import sys
from typing import Any

import torch

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.stages import Stage
from vtoken.stages.attention import Rope

# What an attention is, and may be, built of for its queries and keys to be rotated last of all.
PARTS = {"q_proj", "k_proj", "v_proj"}
NORMS = {"q_norm", "k_norm", "q_layernorm", "k_layernorm"}


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
            "q_proj, k_proj and v_proj, norms of queries and keys, then apply_rotary_pos_emb; take another stage of site "
            f"{stage.site}"
        )


def rope_of(flow: PrefillState, attention: Any, row: int, here: slice, device: torch.device) -> Rope:
    """How an attention rotated what stands in these slots of a row, noted as its layer was entered."""
    assert flow.notes.layer_input is not None
    cos, sin = (t[row if len(t) > 1 else 0, here].to(device) for t in flow.notes.layer_input[1])
    return Rope(cos, sin, rotation_of(attention))
