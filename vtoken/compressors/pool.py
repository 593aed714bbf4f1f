"""Pool: k x k average pooling, the merging baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages import Compressor, Keep, Parts, Site, VisualTokens, size_of


class Pool(Compressor):
    """Averages every `size` x `size` cell of each frame (of each raster of an anyres image) into one token; cells at the edge average
    what is there. The merged token takes the place (and position) of the cell's first token in reading order. Tokens that an
    earlier stage dropped simply do not take part.

    No paper: a baseline.
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "no paper"

    size: int = Field(default=2, ge=1, description="side of the pooled cell, in tokens")

    def select(self, tokens: VisualTokens) -> Keep:
        index, into, start = [], [], 0
        lengths: list[int] = []
        for n, parts in zip(tokens.lengths, tokens.parts, strict=True):
            cells = self._cells(tokens.place[start : start + n], parts)
            _, cell = torch.unique(cells, return_inverse=True)
            m = int(cell.max()) + 1 if n else 0
            arange = torch.arange(n, device=cell.device)
            first, order = torch.full_like(arange[:m], n).scatter_reduce_(0, cell, arange, "amin").sort()
            index.append(first + start)
            into.append(torch.argsort(order)[cell] + sum(lengths))
            lengths.append(m)
            start += n
        return Keep(torch.cat(index), tuple(lengths), torch.cat(into))

    def _cells(self, place: Tensor, parts: Parts) -> Tensor:
        """[n] number of the cell of each token."""
        out, before, cells_before = torch.zeros_like(place), 0, 0
        for part in parts:
            t, h, w = part
            rows, columns = -(-h // self.size), -(-w // self.size)
            p = place - before
            cell = (p // (h * w) * rows + p // w % h // self.size) * columns + p % w // self.size + cells_before
            out = torch.where(p >= 0, cell, out)
            before, cells_before = before + size_of((part,)), cells_before + t * rows * columns
        return out

    def plan(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        cells = [sum(t * -(-h // self.size) * -(-w // self.size) for t, h, w in image) for image in parts]
        return tuple(min(n, c) for n, c in zip(lengths, cells, strict=True))

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width
