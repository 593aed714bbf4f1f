"""Positions (M-RoPE) of a prompt whose pictures are pruned: three axes, frame, row and column.

Where text and pictures stand is known before anything is encoded; which tokens of a picture stay, only afterwards. So
a picture's placeholders first hold its origin, marked as such; every kept token then brings its own place in the
picture along, as further columns of its embedding, and is placed when its chunk of the prompt comes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

AXES = 3
# bfloat16, which embeddings may be in, holds whole numbers up to 256: a coordinate travels as two digits.
BASE = 256
COLUMNS = 2 * AXES


class Span(NamedTuple):
    """The placeholders of a picture or video in a pruned prompt.

    Attributes:
        offset, length: where they begin, and how many are left.
        grid: frames, rows and columns of tokens before pruning.
        step: positions from one frame to the next, a fraction too; a token's is rounded down.
    """

    offset: int
    length: int
    grid: tuple[int, int, int]
    step: float = 1.0

    @property
    def extent(self) -> int:
        """Positions that it takes up: text behind it stands beyond its farthest token, on whichever axis."""
        frames, rows, columns = self.grid
        return max(int((frames - 1) * self.step) + 1, rows, columns)


def prompt_positions(tokens: int, spans: Iterable[Span]) -> tuple[Tensor, int]:
    """Positions [3, L] of a prompt of so many tokens, and what to add to the index of a generated token for its own.

    Text stands where it would in the unpruned prompt. Placeholders hold -1 - origin until they are placed.
    """
    positions, column, position = torch.empty(tokens, dtype=torch.long), 0, 0
    for span in sorted(spans):
        text = span.offset - column
        positions[column : span.offset] = torch.arange(position, position + text)
        position += text
        column = span.offset + span.length
        positions[span.offset : column] = -1 - position
        position += span.extent
    positions[column:] = torch.arange(position, position + tokens - column)
    return positions.repeat(AXES, 1), position - column


def coordinates(index: Tensor, span: Span) -> Tensor:
    """[K, 3] frame (in positions), row and column of tokens [K] of a picture, counted in reading order."""
    _, rows, columns = span.grid
    frame = (index // (rows * columns)).double() * span.step
    return torch.stack([frame.long(), index // columns % rows, index % columns], 1)


def with_places(x: Tensor, places: Tensor) -> Tensor:
    """Embeddings [K, D] and their places [K, 3] in one tensor [K, D + 6] of the dtype of x."""
    return torch.cat([x, (places // BASE).to(x), (places % BASE).to(x)], 1)


def without_places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [K, D] and places [K, 3] of what `with_places` made."""
    digits = x[:, -COLUMNS:].long()
    return x[:, :-COLUMNS], digits[:, :AXES] * BASE + digits[:, AXES:]


def placed(positions: Tensor, media: Tensor, places: Tensor, start: int) -> Tensor:
    """Positions [3, L] once the tokens of a chunk are placed; those that were before, stay.

    Args:
        positions: as `prompt_positions` made them, or as an earlier call left them.
        media: [L] bool, which tokens of the prompt are placeholders.
        places: [n, 3] of the first n placeholders at or behind `start`, the first token of the chunk.
    """
    here = media[start:].nonzero()[: len(places), 0] + start
    before, out = positions[:, here], positions.clone()
    out[:, here] = torch.where(before < 0, places.T.to(before) - 1 - before, before)
    return out
