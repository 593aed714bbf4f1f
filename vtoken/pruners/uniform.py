"""Uniform: an even grid, the spatial baseline."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vtoken.stages import Keep, Pruner, VisualTokens, keep_all


class Uniform(Pruner):
    """Keeps an even sub-grid of the image: rows x columns cells as square as the budget allows, one token at the centre
    of each. When the budget is no product of two numbers the widest rows get one more column, so the count is exact.
    On tokens that an earlier stage already thinned out it keeps evenly spaced survivors in reading order.

    No paper: a baseline.
    """

    paper: ClassVar[str] = "no paper"

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        parts, start = [], 0
        for n, k, (t, h, w) in zip(tokens.lengths, counts, tokens.grid, strict=True):
            parts.append(start + (even_grid(t * h, w, k) if n == t * h * w else centres(n, k)))
            start += n
        return Keep(torch.cat(parts).to(tokens.x.device), counts)


def centres(n: int, k: int) -> Tensor:
    """k whole numbers in 0..n-1, at the centres of k equal parts, all different (k <= n)."""
    return (torch.arange(k) * 2 + 1) * n // (2 * k)


def even_grid(height: int, width: int, k: int) -> Tensor:
    """k raster indices spread evenly over a height x width grid, ascending."""
    rows = min(height, max(-(-k // width), round((k * height / width) ** 0.5), 1))
    base, extra = divmod(k, rows)
    wide = set(centres(rows, extra).tolist()) if extra else set()
    columns = [centres(width, base + (r in wide)) for r in range(rows)]
    return torch.cat([y * width + x for y, x in zip(centres(height, rows).tolist(), columns, strict=True)])
