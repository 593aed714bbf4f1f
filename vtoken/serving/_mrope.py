"""M-RoPE positions of a prompt with pruned pictures, on three axes: frame, row and column.

The positions of text and pictures are known before anything is encoded; which tokens of a picture stay, only
afterwards. So the placeholders of a picture first hold its origin, marked as such. Every kept token carries its place
in the picture as additional columns of its embedding, and gets its position when its chunk of the prompt is processed.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

AXES = 3
# Embeddings may be bfloat16, which holds integers up to 256 exactly: a coordinate is stored as two digits.
BASE = 256
COLUMNS = 2 * AXES


class Span(NamedTuple):
    """The placeholders of a picture or video in a pruned prompt.

    Attributes:
        offset, length: index of the first placeholder, and their number.
        grid: frames, rows and columns of tokens before pruning.
        step: positions from one frame to the next, may be fractional; the position of a token is rounded down.
    """

    offset: int
    length: int
    grid: tuple[int, int, int]
    step: float = 1.0

    @property
    def extent(self) -> int:
        """Number of positions it occupies: text after it starts beyond its farthest token on any axis."""
        frames, rows, columns = self.grid
        return max(int((frames - 1) * self.step) + 1, rows, columns)


def prompt_positions(tokens: int, spans: Iterable[Span]) -> tuple[Tensor, int]:
    """Positions [3, L] of a prompt of `tokens` tokens, and the offset from the index of a generated token to its
    position.

    Text has the positions of the unpruned prompt. Placeholders hold -1 - origin until they are placed.
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
    """[K, 3] frame (in positions), row and column of the tokens [K] of a picture, given by their raster index."""
    _, rows, columns = span.grid
    frame = (index // (rows * columns)).double() * span.step
    return torch.stack([frame.long(), index // columns % rows, index % columns], 1)


def with_places(x: Tensor, places: Tensor) -> Tensor:
    """Embeddings [K, D] and their places [K, 3] in one tensor [K, D + 6] with the dtype of x."""
    return torch.cat([x, (places // BASE).to(x), (places % BASE).to(x)], 1)


def without_places(x: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings [K, D] and places [K, 3] from the output of `with_places`."""
    digits = x[:, -COLUMNS:].long()
    return x[:, :-COLUMNS], digits[:, :AXES] * BASE + digits[:, AXES:]


def placed(positions: Tensor, media: Tensor, places: Tensor, start: int) -> Tensor:
    """Positions [3, L] after the tokens of a chunk are placed; tokens that were placed before keep theirs.

    Args:
        positions: from `prompt_positions`, or from an earlier call.
        media: [L] bool, which tokens of the prompt are placeholders.
        places: [n, 3] of the first n placeholders from `start` on, the first token of the chunk.
    """
    here = media[start:].nonzero()[: len(places), 0] + start
    before, out = positions[:, here], positions.clone()
    out[:, here] = torch.where(before < 0, places.T.to(before) - 1 - before, before)
    return out
