"""How an attention of the decoder rotates its queries and keys: by which function, and whether last of all."""

from __future__ import annotations

import sys
from typing import Any

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
