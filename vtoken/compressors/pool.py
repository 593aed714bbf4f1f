"""Pool: k x k average pooling, the merging baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from vtoken.stages import Compressor, Grid, Keep, Site, VisualTokens


class Pool(Compressor):
    """Averages every `size` x `size` cell of each frame into one token; cells at the edge average what is there. The merged
    token takes the place (and position) of the cell's first token in reading order. Tokens that an earlier stage dropped
    simply do not take part.

    No paper: a baseline.
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "no paper"

    size: int = Field(default=2, ge=1, description="side of the pooled cell, in tokens")

    def select(self, tokens: VisualTokens) -> Keep:
        index, into, start = [], [], 0
        lengths: list[int] = []
        for n, (_, h, w) in zip(tokens.lengths, tokens.grid, strict=True):
            place = tokens.place[start : start + n]
            frame, y, x = place // (h * w), place // w % h, place % w
            cells = (frame * -(-h // self.size) + y // self.size) * -(-w // self.size) + x // self.size
            _, cell = torch.unique(cells, return_inverse=True)
            m = int(cell.max()) + 1 if n else 0
            arange = torch.arange(n, device=cell.device)
            first, order = torch.full_like(arange[:m], n).scatter_reduce_(0, cell, arange, "amin").sort()
            index.append(first + start)
            into.append(torch.argsort(order)[cell] + sum(lengths))
            lengths.append(m)
            start += n
        return Keep(torch.cat(index), tuple(lengths), torch.cat(into))

    def plan(
        self, lengths: Sequence[int], grid: Sequence[Grid], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(
            min(n, t * -(-h // self.size) * -(-w // self.size)) for n, (t, h, w) in zip(lengths, grid, strict=True)
        )

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width
