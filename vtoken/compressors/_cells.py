"""Square cells of the raster, and the mean over each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.stages import Keep, Parts, VisualTokens, size_of


def pooled(tokens: VisualTokens, sides: Sequence[int]) -> Keep:
    """Merges the tokens of each cell into one, at the place of the first. `sides`: side of each image's cells, in
    tokens of the unpruned raster."""
    index, into, start = [], [], 0
    lengths: list[int] = []
    for n, parts, side in zip(tokens.lengths, tokens.parts, sides, strict=True):
        _, cell = torch.unique(_cells(tokens.raster_index[start : start + n], parts, side), return_inverse=True)
        m = int(cell.max()) + 1 if n else 0
        arange = torch.arange(n, device=cell.device)
        first, order = torch.full_like(arange[:m], n).scatter_reduce_(0, cell, arange, "amin").sort()
        index.append(first + start)
        into.append(torch.argsort(order)[cell] + sum(lengths))
        lengths.append(m)
        start += n
    return Keep(torch.cat(index), tuple(lengths), torch.cat(into))


def cells_in(parts: Parts, side: int) -> int:
    """Number of cells of an image with these rasters."""
    return sum(t * -(-h // side) * -(-w // side) for t, h, w in parts)


def _cells(place: Tensor, parts: Parts, side: int) -> Tensor:
    """[n] cell of each token, given its raster index [n]."""
    out, before, cells_before = torch.zeros_like(place), 0, 0
    for part in parts:
        _, h, w = part
        rows, columns = -(-h // side), -(-w // side)
        p = place - before
        cell = (p // (h * w) * rows + p // w % h // side) * columns + p % w // side + cells_before
        out = torch.where(p >= 0, cell, out)
        before, cells_before = before + size_of((part,)), cells_before + cells_in((part,), side)
    return out
