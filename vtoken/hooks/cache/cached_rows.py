"""A layer's cache after a cache stage: its rows, padded on the left, and the logical position of every slot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.left_padding import left_padded, take
from vtoken.hooks.state.prompt_rows import PromptRow
from vtoken.hooks.state.pruned_cache import SlotMap
from vtoken.hooks.state.quantized_layer import Piece, Plain, QuantizedLayer, adopt
from vtoken.stages import uploaded
from vtoken.stages.quantized import QuantizedKV


def slots_of(before: SlotMap, rows: tuple[PromptRow, ...], dense: bool) -> SlotMap:
    """The slots of a layer after the stage left it these rows.

    Args:
        before: its slots before the stage dropped any; dense: whether earlier turns left it without padding.
    """
    columns = [row.columns() for row in rows]
    longest, total = max(map(len, columns)), before.logical.shape[1]
    past = total - max(row.prompt + row.tail for row in rows)
    starts = [prompt_in(row, total).start for row in rows]
    padded = [[-1] * (longest - len(c)) + [start + i for i in c] for start, c in zip(starts, columns, strict=True)]
    index = uploaded(padded, before.logical.device)
    new = take(before.logical, index.clamp(min=0), 1).masked_fill(index < 0, -1)
    logical = torch.cat([before.logical[:, :past], new], 1)
    return replace(before, logical=logical, dense=dense and len(set(map(len, columns))) == 1)


def prompt_in(row: PromptRow, slots: int) -> slice:
    """Where the prompt of a row stands among `slots` slots, which end with the prompt and its tail."""
    return slice(slots - row.prompt - row.tail, slots - row.tail)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The parts, concatenated. Nothing is copied where all but one are empty."""
    full = [part for part in parts if part.shape[dim]]
    return full[0] if len(full) == 1 else torch.cat(full or list(parts), dim)


def store(cached: Any, rows: Sequence[tuple[Piece, Plain]], keys: Tensor, values: Tensor, width: int) -> Any:
    """Replaces the newest `width` of the keys and values [B, Hk, S, d] of a cache layer by rows; returns the layer.

    Args:
        rows: of each row, what is left of its prompt, and its tail.
    """
    if not isinstance(cached, QuantizedLayer) and not any(isinstance(piece, QuantizedKV) for piece, _ in rows):
        cached.keys, cached.values = (
            joined([t[:, :, :-width], left_padded([joined([getattr(x, side) for x in row], 1) for row in rows])], 2)
            for side, t in (("keys", keys), ("values", values))
        )
        return cached
    # Rows may be followed by different numbers of tokens; what all have is a tail.
    tail = min(end.length for _, end in rows)
    left = []
    for piece, end in rows:
        more = end.length - tail
        own = piece if isinstance(piece, QuantizedKV) else Plain.of(piece.keys, piece.values)
        left.append((own, end.first(more)) if more else (own,))
    cached = adopt(cached)
    cached.crop(-width)
    cut = keys.shape[2] - tail
    cached.append(left, (keys[:, :, cut:], values[:, :, cut:]))
    return cached
