"""Square cells of the raster, and the mean over each."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from vtoken.stages import Keep, Parts, VisualTokens, size_of


def pooled(tokens: VisualTokens, sides: Sequence[int]) -> Keep:
    """Merges the tokens of each cell into one, at the place of the first. Waits for the device once, where tokens were
    dropped before. `sides`: side of each image's cells, in tokens of the unpruned raster."""
    cells = [cells_in(parts, side) for parts, side in zip(tokens.parts, sides, strict=True)]
    places = zip(tokens.raster_index.split(tokens.lengths), tokens.parts, sides, strict=True)
    before = accumulate(cells, initial=0)
    cell = torch.cat([_cells(*each) + n for each, n in zip(places, before, strict=False)])
    own = torch.arange(len(cell), device=cell.device)
    first = own.new_full((sum(cells),), len(own)).scatter_reduce_(0, cell, own, "amin")
    lengths = tuple(cells)
    if any(n < size_of(parts) for n, parts in zip(tokens.lengths, tokens.parts, strict=True)):
        lengths = tuple(torch.stack([(each < len(own)).sum() for each in first.split(cells)]).tolist())
    first, order = first.sort()
    return Keep(first[: sum(lengths)], lengths, order.argsort()[cell])


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
