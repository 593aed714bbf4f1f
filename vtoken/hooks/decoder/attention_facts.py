"""Attention rows of a decoder layer that stages ask for beside the last prompt token's, slot by slot.

Every function here takes the queries q [B, H, P, d] of a layer, its keys and values k, v [B, Hk, slots, d] with the cache, and which slots
hold something, ok [B, slots]. It returns [B, slots] (mean_value: [B, slots, d]), 0 where no image's token stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from vtoken.hooks.state.forward_state import PrefillState
from vtoken.hooks.state.prompt_text import text_before, text_slots
from vtoken.kernels import query_attention
from vtoken.stages import offsets_of, uploaded

CHUNK = 64  # queries whose scores over all slots are held at once
Rows = Callable[[PrefillState, Tensor, Tensor, Tensor, Tensor, float], Tensor]


def visual_attention(flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """The last prompt token's, softmax over the tokens of each image alone, head mean."""
    return _among(flow, flow.of_last(q, 2), k, scale)


def visual_value_attention(
    flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float
) -> Tensor:
    """The same with values for query and keys."""
    return _among(flow, flow.of_last(v, 2), v, scale)


def mean_value(flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Values, mean over heads."""
    return v.float().mean(1)


def cross_attention(flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Of the text behind each image: maximum over heads, mean over that text."""
    return _per_image(flow, q, k, key_mask, scale, _behind(flow), _head_maximum)


def self_attention(flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Of each image's own tokens: maximum over heads, mean over them."""
    return _per_image(flow, q, k, key_mask, scale, _own(flow), _head_maximum)


def relayed_attention(flow: PrefillState, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor, scale: float) -> Tensor:
    """Of the text behind each image, head mean, weighted by what that text receives from itself; mean over it."""
    return _per_image(flow, q, k, key_mask, scale, _behind(flow), _relay)


ROWS: dict[str, Rows] = {
    row.__name__: row
    for row in (
        visual_attention,
        visual_value_attention,
        mean_value,
        cross_attention,
        self_attention,
        relayed_attention,
    )
}


def causal(q: Tensor, k: Tensor, key_mask: Tensor, at: Tensor, scale: float) -> Iterator[Tensor]:
    """Attention [Hk, H / Hk, R, N] of the queries [H, ., d] that stand in the slots `at` of the keys [Hk, N, d], a chunk at a time.

    `query_attention` lets every query see all keys; these each see a prefix.
    """
    grouped, keys = q.float().unflatten(0, (len(k), -1)), k.float()
    slots = torch.arange(len(key_mask), device=key_mask.device)
    for part, end in zip(grouped.split(CHUNK, 2), at.split(CHUNK), strict=True):
        scores = torch.einsum("hgrd,hnd->hgrn", part, keys) * scale
        yield scores.masked_fill(~key_mask | (slots > end[:, None]), -torch.inf).softmax(-1)


def _head_maximum(rows: Iterator[Tensor], at: Tensor) -> Tensor:
    return torch.stack([part.amax((0, 1)).sum(0) for part in rows]).sum(0) / len(at)


def _relay(rows: Iterator[Tensor], at: Tensor) -> Tensor:
    mean = torch.cat([part.mean((0, 1)) for part in rows])
    return mean[:, at].sum(0) @ mean / len(at)


def _among(flow: PrefillState, query: Tensor, k: Tensor, scale: float) -> Tensor:
    """One query [B, H, d] per row over the tokens of each of its images alone."""
    batch_row, column = _places(flow, k)
    lengths, rows = flow.live.lengths, uploaded(flow.live.row, k.device)
    one_each = torch.arange(len(lengths) + 1, dtype=torch.int32, device=k.device)
    found = query_attention(
        query[rows], k.transpose(1, 2)[batch_row, column], one_each, offsets_of(lengths, k.device), scale
    )
    out = found.new_zeros(len(k), k.shape[2])
    out[batch_row, column] = found
    return out


def _per_image(
    flow: PrefillState,
    q: Tensor,
    k: Tensor,
    key_mask: Tensor,
    scale: float,
    queries: list[Tensor],
    reduce: Callable[[Iterator[Tensor], Tensor], Tensor],
) -> Tensor:
    """`reduce` of each image's query rows, at the image's own slots.

    Args:
        queries: per image, slots of the current layout; an image without any gets zeros.
        reduce: takes the rows and the queries' slots among those of k; returns [slots].
    """
    visual, past = flow.live, k.shape[2] - flow.index.shape[1]
    out = k.new_zeros(key_mask.shape, dtype=torch.float32)
    lines, columns = (i.split(visual.lengths) for i in _places(flow, k))
    for row, batch_row, column, at in zip(visual.row, lines, columns, queries, strict=True):
        at = at.to(k.device)
        if len(at) and len(column):
            found = reduce(causal(q[row, :, at], k[row], key_mask[row], at + past, scale), at + past)
            out[batch_row, column] = found[column]
    return out


def _places(flow: PrefillState, k: Tensor) -> tuple[Tensor, Tensor]:
    """(row, slot) of every live visual token among the slots of k."""
    batch_row, column = (i.to(k.device) for i in flow.slot())
    return batch_row, column + k.shape[2] - flow.index.shape[1]


def _own(flow: PrefillState) -> list[Tensor]:
    return list(flow.slot()[1].split(flow.live.lengths))


def _behind(flow: PrefillState) -> list[Tensor]:
    text = text_slots(flow)
    return [text[row].nonzero()[n:, 0] for row, n in zip(flow.live.row, text_before(flow), strict=True)]
