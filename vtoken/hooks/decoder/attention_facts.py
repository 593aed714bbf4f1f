"""Facts of a decoder layer, slot by slot: a function per fact, of the fact's name.

Each takes a `LayerAttention` and returns [B, slots, ...], see `stages.facts`. Attention is 0 where no image's token
stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import text_at, text_before
from vtoken.kernels import query_attention
from vtoken.stages import image_of, offsets_of, positions, uploaded

CHUNK = 1 << 24  # attention scores that are in memory at once: 64 MiB


@dataclass(frozen=True)
class LayerAttention:
    """What a layer's attention is given in a prefill.

    Attributes:
        flow: the prefill, of P new slots per row.
        q: [B, H, P, d] queries; k, v: [B, Hk, slots, d] keys and values with the cache. Queries and keys carry RoPE.
        key_mask: [B, slots] which slots hold a token.
        scale: factor on q . k.
        window: slots that a query sees, its own among them; None: all up to its own.
    """

    flow: PrefillState
    q: Tensor
    k: Tensor
    v: Tensor
    key_mask: Tensor
    scale: float
    window: int | None

    @property
    def past(self) -> int:
        """Slots in front of this prefill's."""
        return self.k.shape[2] - self.flow.index.shape[1]

    def places(self) -> tuple[Tensor, Tensor]:
        """(row, slot) of every live visual token."""
        batch_row, column = (i.to(self.k.device) for i in self.flow.slot())
        return batch_row, column + self.past


def keys(layer: LayerAttention) -> Tensor:
    """Of all heads, with RoPE: [B, slots, Hk, d]."""
    return layer.k.transpose(1, 2)


def last_query_attention(layer: LayerAttention) -> Tensor:
    """The last prompt token's, head mean."""
    flow = layer.flow
    whole = flow.key_mask is None and flow.answer is None and layer.window is None
    key_mask = None if whole else layer.key_mask
    return last_row(flow, flow.of_last(layer.q, 2), layer.k, key_mask, layer.scale, layer.window)


def visual_attention(layer: LayerAttention) -> Tensor:
    """The last prompt token's, softmax over the tokens of each image alone (of them it sees), head mean."""
    tails, window = layer.flow.tails, layer.window
    seen = None if window is None else visible(layer.key_mask, tails, window)
    return _among(layer, layer.flow.of_last(layer.q, 2), layer.k, seen)


def visual_value_attention(layer: LayerAttention) -> Tensor:
    """The same with values for query and keys."""
    return _among(layer, layer.flow.of_last(layer.v, 2), layer.v)


def values(layer: LayerAttention) -> Tensor:
    """Of all heads: [B, slots, Hk, d]."""
    return layer.v.transpose(1, 2)


def mean_value(layer: LayerAttention) -> Tensor:
    """Values, mean over heads."""
    return layer.v.float().mean(1)


def cross_attention(layer: LayerAttention) -> Tensor:
    """Of the text behind each image: maximum over heads, mean over that text."""
    return _per_image(layer, _behind(layer.flow), _head_maximum)


def self_attention(layer: LayerAttention) -> Tensor:
    """Of each image's own tokens: maximum over heads, mean over them."""
    own = layer.flow.slot()[1].split(layer.flow.live.lengths)
    return _per_image(layer, own, _head_maximum, both_ways=layer.flow.blocks is not None)


def relayed_attention(layer: LayerAttention) -> Tensor:
    """Of the text behind each image, head mean, weighted by what that text receives from itself; mean over it."""
    return _per_image(layer, _behind(layer.flow), _relay)


FUNCTIONS: dict[str, Callable[[LayerAttention], Tensor]] = {
    function.__name__: function
    for function in (
        keys,
        last_query_attention,
        visual_attention,
        visual_value_attention,
        values,
        mean_value,
        cross_attention,
        self_attention,
        relayed_attention,
    )
}


def attention_of_text(layer: LayerAttention, chosen: Sequence[Tensor] | None = None) -> Tensor:
    """[B, slots] attention that each image receives from text, mean over that text and the heads; 0 elsewhere.

    Args:
        chosen: per image, which text tokens of its row; None: those behind it.
    """
    flow = layer.flow
    if chosen is None:
        return _per_image(layer, _behind(flow), _mean)
    text = text_at(flow)
    queries = [
        text[row][i.to(text[row].device, non_blocking=True)] for row, i in zip(flow.live.row, chosen, strict=True)
    ]
    return _per_image(layer, queries, _mean)


def last_row(
    flow: PrefillState, q: Tensor, k: Tensor, key_mask: Tensor | None, scale: float, window: int | None = None
) -> Tensor:
    """[B, slots] attention of one query per row, head mean. Asks the device in a later turn, where rows differ.

    Args:
        q: [B, H, d] of the last prompt token; k: [B, H, slots, d].
        key_mask: [B, slots] slots that hold something; None: all do, and none comes after the query.
        window: slots that the query sees, its own among them; None: all up to its own.
    """
    if key_mask is None:
        batch, slots = len(k), k.shape[2]
        each, all_of = (offsets_of([n] * batch, k.device) for n in (1, slots))
        return query_attention(q, k.transpose(1, 2).flatten(0, 1), each, all_of, scale).view(batch, slots)
    key_mask = visible(key_mask, flow.tails, window)
    seen = [count - tail for count, tail in zip(flow.counts, flow.tails, strict=True)]
    seen = key_mask.sum(1).tolist() if flow.past else [min(n, window or n) for n in seen]
    at = positions(key_mask.flatten(), sum(seen))
    keys = k.transpose(1, 2)[at // k.shape[2], at % k.shape[2]]
    one_each = torch.arange(len(k) + 1, dtype=torch.int32, device=k.device)
    packed = query_attention(q, keys, one_each, offsets_of(seen, k.device), scale)
    return packed.new_zeros(key_mask.numel()).index_copy_(0, at, packed).view(key_mask.shape)


def visible(key_mask: Tensor, tails: Sequence[int], window: int | None) -> Tensor:
    """[B, slots] what the last prompt token sees of the slots that hold something; see `last_row`."""
    if any(tails):
        ends = key_mask.shape[1] - uploaded(tails, key_mask.device)
        key_mask = key_mask & (torch.arange(key_mask.shape[1], device=key_mask.device) < ends[:, None])
    return key_mask if window is None else key_mask & (key_mask.flip(1).cumsum(1).flip(1) <= window)


def causal_mean(q: Tensor, k: Tensor, key_mask: Tensor, at: Tensor, scale: float, window: int | None) -> Tensor:
    """[N] attention of the queries [H, R, d] that stand in the slots `at` [R] of the keys [Hk, N, d], mean over queries
    and heads."""
    return _mean(causal(q, k, key_mask, at, scale, window), at)


def causal(
    q: Tensor,
    k: Tensor,
    key_mask: Tensor,
    at: Tensor,
    scale: float,
    window: int | None = None,
    until: Tensor | None = None,
) -> Iterator[Tensor]:
    """Attention [..., Hk, H / Hk, R, N] of the queries [..., H, R, d] that stand in the slots `at` [..., R] of the keys
    [..., Hk, N, d], of which key_mask [..., N] holds something, a chunk at a time.

    `query_attention` lets every query see all keys; these each see a prefix, up to the slots `until` [..., R] if not
    their own, or what of it is in a window that ends at their own.
    """
    grouped, keys = q.float().unflatten(-3, (k.shape[-3], -1)), k.float()
    slots = torch.arange(k.shape[-2], device=key_mask.device)
    rank = None if window is None else key_mask.cumsum(-1)
    chunk = max(1, CHUNK // max(1, q[..., 0, 0].numel() * len(slots)))
    ends = (at if until is None else until).split(chunk, -1)
    for part, own, end in zip(grouped.split(chunk, -2), at.split(chunk, -1), ends, strict=True):
        scores = torch.einsum("...hgrd,...hnd->...hgrn", part, keys) * scale
        hidden = ~key_mask[..., None, :] | (slots > end[..., None])
        if rank is not None and window is not None:
            hidden |= rank[..., None, :] <= rank.gather(-1, own)[..., None] - window
        yield scores.masked_fill(hidden[..., None, None, :, :], -torch.inf).softmax(-1)


def _head_maximum(rows: Iterator[Tensor], at: Tensor) -> Tensor:
    return torch.stack([part.amax((-4, -3)).sum(-2) for part in rows]).sum(0) / at.shape[-1]


def _mean(rows: Iterator[Tensor], at: Tensor) -> Tensor:
    return torch.stack([part.mean((-4, -3)).sum(-2) for part in rows]).sum(0) / at.shape[-1]


def _relay(rows: Iterator[Tensor], at: Tensor) -> Tensor:
    mean = torch.cat([part.mean((-4, -3)) for part in rows], -2)
    received = mean.gather(-1, at[:, None].expand(-1, at.shape[-1], -1)).sum(-2)
    return (received[:, None] @ mean)[:, 0] / at.shape[-1]


def _among(layer: LayerAttention, query: Tensor, k: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of one query [B, H, d] per row to the keys k [B, Hk, slots, d] of each image of the row alone, or to
    those of them in the slots that are `seen` [B, slots]."""
    batch_row, column = layer.places()
    lengths: Sequence[int] = layer.flow.live.lengths
    rows = uploaded(layer.flow.live.row, k.device)
    if seen is not None:
        image, near = image_of(lengths, k.device), seen[batch_row, column]
        lengths = image.new_zeros(len(lengths)).index_add_(0, image, near.to(image)).tolist()
        batch_row, column = batch_row[near], column[near]
    one_each = torch.arange(len(lengths) + 1, dtype=torch.int32, device=k.device)
    found = query_attention(
        query[rows], k.transpose(1, 2)[batch_row, column], one_each, offsets_of(lengths, k.device), layer.scale
    )
    out = found.new_zeros(len(k), k.shape[2])
    out[batch_row, column] = found
    return out


def _per_image(
    layer: LayerAttention,
    queries: Sequence[Tensor],
    reduce: Callable[[Iterator[Tensor], Tensor], Tensor],
    *,
    both_ways: bool = False,
) -> Tensor:
    """`reduce` of each image's query rows, at the image's own slots. Images with as many queries together.

    Args:
        queries: per image, slots of the current layout; an image without any gets zeros.
        reduce: takes the rows of several images and the queries' slots [images, R] among those of k; returns
            [images, slots].
        both_ways: whether the queries of an image see all of each other.
    """
    visual, k, past = layer.flow.live, layer.k, layer.past
    alike: dict[int, list[int]] = {}
    for image, at in enumerate(queries):
        if len(at) and visual.lengths[image]:
            alike.setdefault(len(at), []).append(image)
    found = k.new_zeros(len(queries), k.shape[2], dtype=torch.float32)
    for images in alike.values():
        at = torch.stack([queries[image] for image in images]).to(k.device) + past
        rows = uploaded([visual.row[image] for image in images], k.device)
        until = at[:, -1:].expand_as(at) if both_ways else None
        queried = layer.q[rows[:, None], :, at - past].transpose(1, 2)
        attention = causal(queried, k[rows], layer.key_mask[rows], at, layer.scale, layer.window, until)
        found[uploaded(images, k.device)] = reduce(attention, at)
    out, places = k.new_zeros(layer.key_mask.shape, dtype=torch.float32), layer.places()
    out[places] = found[image_of(visual.lengths, k.device), places[1]]
    return out


def _behind(flow: PrefillState) -> list[Tensor]:
    """Per image, slots of the text behind it."""
    text = text_at(flow)
    return [text[row][n:] for row, n in zip(flow.live.row, text_before(flow), strict=True)]
