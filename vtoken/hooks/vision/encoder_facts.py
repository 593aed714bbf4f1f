"""Attention facts of a vision tower, recomputed for the few queries that are needed.

The layer's own projections are tapped, so nothing is projected twice, the tower keeps its attention backend, and quantised,
offloaded or adapted Linears keep working. No N x N map is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from vtoken.hooks.state.fact_tables import PROJECTIONS
from vtoken.kernels import query_attention, received_attention
from vtoken.stages import Fact, offsets_of


def projections(names: Iterable[str]) -> list[str]:
    """The projections to tap for these facts."""
    return sorted({p for name in names for p in PROJECTIONS[name]})


def compute(
    fact: Fact,
    outputs: dict[str, Tensor],
    lengths: Sequence[int],
    heads: int,
    scale: float,
    cls: bool,
    bias: Tensor | None = None,
) -> Tensor:
    """One fact of one layer, for CLS (row 0 of each crop, if the tower has one) and patches.

    Args:
        outputs: projection name -> [ΣM, H*d], packed over crops, where M_i = lengths[i] + 1 if the tower has a CLS token.
        lengths: live patches per crop.
        bias: [ΣM] what the tower adds to the logits of each key.

    Returns:
        [ΣM] float32 for attention facts, [ΣM, H*d] for keys and values, [ΣM, d] float32 for mean_value and mean_key.
    """
    name = fact.name
    if name in ("keys", "values"):
        return outputs[PROJECTIONS[name][0]]
    split = {p: outputs[p].unflatten(-1, (heads, -1)) for p in PROJECTIONS[name]}
    if name in ("mean_value", "mean_key"):
        return split[PROJECTIONS[name][0]].float().mean(1)
    held = [n + cls for n in lengths]
    if name == "value_attention":
        return one_query(split["v_proj"], split["v_proj"], held, 1.0, cls)
    q, k = split["q_proj"], split["k_proj"]
    if bias is not None:
        q, k = biased(q, k, bias, scale)
    if name == "received_attention":
        return received(q, k, offsets_of(held, k.device), scale, fact.above, cls)
    return one_query(q, k, held, scale, cls)


def biased(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k [ΣM, H, d + 1] whose scaled products are those of q and k [ΣM, H, d] plus the key's bias [ΣM]."""
    column = bias[:, None, None].to(k).expand(-1, k.shape[1], 1)
    return torch.cat([q, torch.full_like(q[..., :1], 1 / scale)], -1), torch.cat([k, column], -1)


def received(q: Tensor, k: Tensor, offsets: Tensor, scale: float, above: float, cls: bool) -> Tensor:
    """[ΣM] attention that each token receives within its segment, `above` as in Fact. q, k [ΣM, H, d].

    The queries that count are chosen by what they receive, so with `above` the device is asked how many they are.
    """
    everyone = mean_received(q, k, offsets, offsets, scale)
    if not above:
        return everyone
    chosen = []
    for segment in everyone.split(offsets.diff().tolist()):
        patches = segment[int(cls) :]
        mask = patches > above * patches.mean()
        mask[patches.argmax()] = True
        chosen.append(torch.nn.functional.pad(mask, (int(cls), 0)))
    counts = torch.stack([mask.sum() for mask in chosen]).tolist()
    return mean_received(q[torch.cat(chosen)], k, offsets_of(counts, k.device), offsets, scale)


def mean_received(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """[ΣM] what each key receives of the queries [ΣQ, H, d] of its segment, mean over them and the heads."""
    total = received_attention(q, k, q_offsets, k_offsets, scale).mean(1)
    return total / q_offsets.diff().clamp(min=1).repeat_interleave(k_offsets.diff(), output_size=len(k))


def one_query(q: Tensor, k: Tensor, held: Sequence[int], scale: float, cls: bool) -> Tensor:
    """[ΣM] attention of one query per image: row 0 of its q [ΣM, H, d] (the CLS token), or without CLS their mean.

    Args:
        k: [ΣM, H, d].
        held: M_i, tokens of each image.
    """
    offsets = offsets_of(held, k.device)
    if cls:
        query = q[offsets[:-1].long()]
    else:
        counts = torch.tensor(held, device=q.device)
        query = torch.segment_reduce(q.float(), "mean", lengths=counts, unsafe=True).to(q.dtype)
    one_each = torch.arange(len(held) + 1, dtype=torch.int32, device=k.device)
    return query_attention(query, k, one_each, offsets, scale)
