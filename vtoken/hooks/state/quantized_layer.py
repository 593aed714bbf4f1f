"""A cache layer that holds rows in few bits.

It replaces a DynamicLayer: `keys` and `values` are dequantized whenever they are read, that is at every step. A row is
a sequence of pieces; the newest tokens of all rows are a tail at full precision, which grows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vtoken.hooks.state.left_padding import left_padded
from vtoken.stages.quantized import QuantizedKV


@dataclass(frozen=True)
class Plain:
    """Keys and values [Hk, n, d] at full precision."""

    keys: Tensor
    values: Tensor

    @classmethod
    def of(cls, keys: Tensor, values: Tensor) -> Plain:
        """Holds copies: what these are views of can then be freed."""
        return cls(keys.clone(), values.clone())

    @property
    def length(self) -> int:
        return self.keys.shape[1]

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values

    def first(self, count: int) -> Plain:
        return Plain.of(self.keys[:, :count], self.values[:, :count])

    def map(self, function: Callable[[Tensor], Tensor]) -> Plain:
        return Plain(function(self.keys), function(self.values))


Piece = Plain | QuantizedKV
Side = Literal["keys", "values"]


@dataclass(frozen=True)
class Block:
    """Slots of all rows of a batch, with padding on the left.

    Attributes:
        rows: of every row its pieces, in order.
        order: [B] which of `rows` each row of the batch reads, None: its own. So beams share pieces, and reordering
            does not wait for the device.
    """

    rows: tuple[tuple[Piece, ...], ...]
    order: Tensor | None = None

    @property
    def length(self) -> int:
        return max(sum(piece.length for piece in row) for row in self.rows)

    def read(self, side: Side) -> Tensor:
        """[B, Hk, length, d]."""
        x = left_padded([torch.cat([getattr(piece, side) for piece in row], 1) for row in self.rows])
        return x if self.order is None else x.index_select(0, self.order)

    def select(self, index: Tensor) -> Block:
        """The block whose batch consists of rows `index` [B'] of this one's."""
        return replace(self, order=index if self.order is None else self.order.index_select(0, index))

    def crop(self, count: int) -> Block:
        """Without the newest `count` slots, which are real in every row."""
        rows = []
        for row in self.rows:
            left, pieces = sum(piece.length for piece in row) - count, list[Piece]()
            for piece in row:
                if left > 0 or not pieces:
                    pieces.append(piece if piece.length <= left else piece.first(max(0, left)))
                left -= piece.length
            rows.append(tuple(pieces))
        return replace(self, rows=tuple(rows))

    def map(self, function: Callable[[Tensor], Tensor]) -> Block:
        rows = tuple(tuple(piece.map(function) for piece in row) for row in self.rows)
        return Block(rows, None if self.order is None else function(self.order))

    def packed(self) -> list[bool]:
        """Per row of the batch, whether any of it is quantized. Waits for the device where rows were reordered."""
        own = [any(isinstance(piece, QuantizedKV) for piece in row) for row in self.rows]
        return own if self.order is None else [own[row] for row in self.order.tolist()]

    def tensors(self) -> list[Tensor]:
        return [t for row in self.rows for piece in row for t in piece.tensors()]


class QuantizedLayer(DynamicLayer):
    """See above. `adopt` makes one of a live DynamicLayer.

    Attributes:
        blocks: the slots before the tail.
        tail: keys and values [B, Hk, t, d] of the newest tokens.
    """

    blocks: tuple[Block, ...]
    tail: tuple[Tensor, Tensor]

    @property
    def keys(self) -> Tensor:  # type: ignore[override]
        """[B, Hk, S, d]; what is written into it is lost."""
        return torch.cat([*(block.read("keys") for block in self.blocks), self.tail[0]], 2)

    @property
    def values(self) -> Tensor:  # type: ignore[override]
        """[B, Hk, S, d]; what is written into it is lost."""
        return torch.cat([*(block.read("values") for block in self.blocks), self.tail[1]], 2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.tail
        self.tail = torch.cat([keys, key_states], 2), torch.cat([values, value_states], 2)
        return self.keys, self.values

    def append(self, rows: Sequence[tuple[Piece, ...]], tail: tuple[Tensor, Tensor]) -> None:
        """Adds a block of these rows and, behind it, a new tail; the tail so far becomes a block in front of both."""
        if self.tail[0].shape[2]:
            old = tuple((Plain(k, v),) for k, v in zip(*self.tail, strict=True))
            self.blocks = (*self.blocks, Block(old))
        self.blocks, self.tail = (*self.blocks, Block(tuple(rows))), (tail[0].clone(), tail[1].clone())

    def get_seq_length(self) -> int:
        return sum(block.length for block in self.blocks) + self.tail[0].shape[2]

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the newest -tokens_to_remove tokens; a positive number is the length to crop to, as in older versions
        of transformers."""
        count, (keys, values) = -tokens_to_remove, self.tail
        if tokens_to_remove > 0:
            count = max(0, self.get_seq_length() - tokens_to_remove)
        left = max(0, keys.shape[2] - count)
        count -= keys.shape[2] - left
        self.tail = keys[:, :, :left].clone(), values[:, :, :left].clone()
        blocks = list(self.blocks)
        while count and blocks:
            last = blocks.pop()
            if last.length > count:
                blocks.append(last.crop(count))
            count -= min(count, last.length)
        self.blocks = tuple(blocks)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._select(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        # `indices` may be a mask.
        self._select(torch.arange(len(self.tail[0]), device=indices.device)[indices])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._select(torch.arange(len(self.tail[0])).repeat_interleave(repeats))

    def _select(self, index: Tensor) -> None:
        index = index.to(self.tail[0].device)
        self.blocks = tuple(block.select(index) for block in self.blocks)
        self.tail = self.tail[0].index_select(0, index), self.tail[1].index_select(0, index)

    def offload(self) -> None:
        self._to(torch.device("cpu"))

    def prefetch(self) -> None:
        self._to(self.device)

    def _to(self, device: torch.device) -> None:
        def move(x: Tensor) -> Tensor:
            return x.to(device, non_blocking=True)

        self.blocks = tuple(block.map(move) for block in self.blocks)
        self.tail = move(self.tail[0]), move(self.tail[1])

    def reset(self) -> None:
        """Back to an empty DynamicLayer."""
        vars(self).clear()
        self.__class__ = DynamicLayer  # type: ignore[assignment]
        DynamicLayer.__init__(self)

    def tensors(self) -> list[Tensor]:
        """Tensors of all pieces, with what is needed to read them, and the tail."""
        return [*(t for block in self.blocks for t in block.tensors()), *self.tail]


def adopt(cached: Any) -> QuantizedLayer:
    """Makes a live DynamicLayer a QuantizedLayer (idempotent); what it holds becomes the tail."""
    if isinstance(cached, QuantizedLayer):
        return cached
    state = vars(cached)
    tail = state.pop("keys"), state.pop("values")
    cached.__class__ = QuantizedLayer
    cached.blocks, cached.tail = (), tail
    packed: QuantizedLayer = cached
    return packed
