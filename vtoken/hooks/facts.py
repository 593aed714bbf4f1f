"""Attention facts of a vision tower, recomputed for the few queries that are needed.

The layer's own projections are tapped, so nothing is projected twice, the tower keeps its attention backend, and quantised,
offloaded or adapted Linears keep working. No N x N map is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vtoken.kernels import query_attention
from vtoken.stages import offsets_of

# Which projections a fact reads.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "cls_attention": ("q_proj", "k_proj"),
    "received_attention": ("q_proj", "k_proj"),
    "keys": ("k_proj",),
    "values": ("v_proj",),
}


def projections(names: Iterable[str]) -> list[str]:
    """The projections to tap for these facts."""
    return sorted({p for name in names for p in PROJECTIONS[name]})


def compute(
    name: str, outputs: dict[str, Tensor], lengths: Sequence[int], heads: int, scale: float, cls: bool
) -> Tensor:
    """One fact of one layer, for CLS (row 0 of each crop, if the tower has one) and patches.

    Args:
        outputs: projection name -> [ΣM, H*d], packed over crops, where M_i = lengths[i] + 1 if the tower has a CLS token.
        lengths: live patches per crop.

    Returns:
        [ΣM] float32 for attention facts, [ΣM, H*d] for keys and values.
    """
    if name in ("keys", "values"):
        return outputs[PROJECTIONS[name][0]]
    q, k = (outputs[p].unflatten(-1, (heads, -1)) for p in ("q_proj", "k_proj"))
    offsets = offsets_of([n + cls for n in lengths], k.device)
    if name == "received_attention":
        return query_attention(q, k, offsets, offsets, scale)
    one_each = torch.arange(len(lengths) + 1, dtype=torch.int32, device=k.device)
    return query_attention(q[offsets[:-1].long()], k, one_each, offsets, scale)
