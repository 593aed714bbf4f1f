"""Facts of an encoder layer, recomputed for the few queries that are needed: a function per fact, of the fact's name.

The layer's own projections are tapped, so nothing is projected twice, the tower keeps its attention backend, and
quantized, offloaded or adapted Linears keep working. No N x N map is made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vtoken.kernels import query_attention
from vtoken.kernels import received_attention as received_sums
from vtoken.stages import Fact, offsets_of, positions, uploaded
from vtoken.stages.facts import read_of

OF_LAYER = read_of("encoder layer")


@dataclass
class EncoderLayer:
    """What one layer projected from the live patches of a call, and how it attends.

    Attributes:
        projected: q, k, v -> [ΣM, H, d], only those that the facts read; CLS tokens stand in front of their crops.
        lengths: M_i of every image (padded towers: of every crop).
        bounds: offsets of the segments that attend within themselves; None: the images.
        scale: factor on q . k; cls: whether there are CLS tokens.
        turn: applies to q and k what the layer does before it multiplies them (rotary, a bias on keys); None: nothing.
    """

    projected: dict[str, Tensor]
    lengths: Sequence[int]
    scale: float
    cls: bool
    bounds: Tensor | None = None
    turn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None

    @cached_property
    def multiplied(self) -> tuple[Tensor, Tensor]:
        """q and k as the layer multiplies them."""
        q, k = self.projected["q"], self.projected["k"]
        return (q, k) if self.turn is None else self.turn(q, k)


def projections(facts: Iterable[Fact]) -> list[str]:
    """Names of the projections (q, k, v) to tap for these facts."""
    return sorted({letter for fact in facts for letter in OF_LAYER[fact.name].projections})


def compute(fact: Fact, layer: EncoderLayer) -> Tensor:
    """One fact of one layer for CLS and patches: [ΣM] float32 for attention; for keys and values [ΣM, H*d], or
    [ΣM, d] float32 for their means over heads."""
    return FUNCTIONS[fact.name](layer, fact)


def cls_attention(layer: EncoderLayer, fact: Fact) -> Tensor:
    return one_query(*layer.multiplied, layer.lengths, layer.scale, layer.cls)


def global_attention(layer: EncoderLayer, fact: Fact) -> Tensor:
    return one_query(*layer.multiplied, layer.lengths, layer.scale, layer.cls)


def value_attention(layer: EncoderLayer, fact: Fact) -> Tensor:
    v = layer.projected["v"]
    return one_query(v, v, layer.lengths, 1.0, layer.cls)


def received_attention(layer: EncoderLayer, fact: Fact) -> Tensor:
    q, k = layer.multiplied
    bounds = offsets_of(layer.lengths, k.device) if layer.bounds is None else layer.bounds
    if not fact.above:
        return mean_received(q, k, bounds, bounds, layer.scale)
    lengths = layer.lengths if layer.bounds is None else bounds.diff().tolist()
    return received_above(q, k, lengths, layer.scale, fact.above, layer.cls)


def keys(layer: EncoderLayer, fact: Fact) -> Tensor:
    return layer.projected["k"].flatten(1)


def values(layer: EncoderLayer, fact: Fact) -> Tensor:
    return layer.projected["v"].flatten(1)


def mean_key(layer: EncoderLayer, fact: Fact) -> Tensor:
    return layer.projected["k"].float().mean(1)


def mean_value(layer: EncoderLayer, fact: Fact) -> Tensor:
    return layer.projected["v"].float().mean(1)


FUNCTIONS: dict[str, Callable[[EncoderLayer, Fact], Tensor]] = {
    function.__name__: function
    for function in (
        cls_attention,
        global_attention,
        value_attention,
        received_attention,
        keys,
        values,
        mean_key,
        mean_value,
    )
}


def biased(q: Tensor, k: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q and k [ΣM, H, d + 1] whose scaled products are those of q and k [ΣM, H, d] plus the key's bias [ΣM]."""
    column = bias[:, None, None].to(k).expand(-1, k.shape[1], 1)
    return torch.cat([q, torch.full_like(q[..., :1], 1 / scale)], -1), torch.cat([k, column], -1)


def received_above(q: Tensor, k: Tensor, lengths: Sequence[int], scale: float, above: float, cls: bool) -> Tensor:
    """[ΣM] attention that each token receives within its segment from those queries that receive enough themselves,
    see `above` of Fact. q, k [ΣM, H, d]. Asks the device once how many these are."""
    offsets = offsets_of(lengths, k.device)
    chosen = []
    for segment in mean_received(q, k, offsets, offsets, scale).split(list(lengths)):
        patches = segment[int(cls) :]
        mask = (patches > above * patches.mean()).index_fill(0, patches.argmax()[None], True)
        chosen.append(torch.nn.functional.pad(mask, (int(cls), 0)))
    counts = torch.stack([mask.sum() for mask in chosen]).tolist()
    queries = q[positions(torch.cat(chosen), sum(counts))]
    return mean_received(queries, k, offsets_of(counts, k.device), offsets, scale)


def mean_received(q: Tensor, k: Tensor, q_offsets: Tensor, k_offsets: Tensor, scale: float) -> Tensor:
    """[ΣM] attention that each key receives from the queries [ΣQ, H, d] of its segment, their and the heads' mean."""
    total = received_sums(q, k, q_offsets, k_offsets, scale).mean(1)
    return total / q_offsets.diff().clamp(min=1).repeat_interleave(k_offsets.diff(), output_size=len(k))


def one_query(q: Tensor, k: Tensor, lengths: Sequence[int], scale: float, cls: bool) -> Tensor:
    """[ΣM] attention of one query per image: row 0 of its q [ΣM, H, d] (the CLS token), or without CLS their mean.

    Args:
        k: [ΣM, H, d].
        lengths: M_i, tokens of each image.
    """
    offsets = offsets_of(lengths, k.device)
    if min(lengths) == max(lengths):
        rows = q.unflatten(0, (len(lengths), -1))
        query = rows[:, 0] if cls else rows.float().mean(1).to(q.dtype)
    elif cls:
        query = q[offsets[:-1]]
    else:
        sizes = uploaded(lengths, q.device)
        query = torch.segment_reduce(q.float(), "mean", lengths=sizes, unsafe=True).to(q.dtype)
    return query_attention(query, k, offsets_of([1] * len(lengths), k.device), offsets, scale)
