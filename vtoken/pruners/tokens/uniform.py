"""Uniform: an even grid, the spatial baseline."""

from __future__ import annotations

from typing import ClassVar

from vtoken.stages import Keep, Parts, Pruner, VisualTokens, keep_all, size_of, uploaded
from vtoken.stages.budget import Budget


class Uniform(Pruner):
    """Keeps an even sub-grid of the image: rows x columns of cells as square as the budget allows, one token at the
    centre of each. If the budget is not a product of two numbers, some rows get one more column, so the count is exact.
    The frames of a video are stacked vertically (with per_frame, each is treated by itself); the two rasters of an
    anyres image share the budget in proportion to their sizes. On tokens that an earlier stage thinned out, and within
    crops, it keeps evenly spaced tokens in reading order.

    No paper: a baseline.
    """

    paper: ClassVar[str] = "no paper"

    def select(self, tokens: VisualTokens) -> Keep:
        if self.keep.per is not None and tokens.segment is not None:
            return self._each_segment(tokens)
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        kept, start = list[int](), 0
        for i, (n, k) in enumerate(zip(tokens.lengths, counts, strict=True)):
            kept += [start + at for at in (even(tokens.parts[i], k) if tokens.whole(i) else centres(n, k))]
            start += n
        return Keep(uploaded(kept, tokens.x.device), counts)

    def _each_segment(self, tokens: VisualTokens) -> Keep:
        order, sizes, keep, lengths = self.per_segment(tokens)
        if keep == sizes:
            return keep_all(tokens)
        kept, start, segments = list[int](), 0, len(sizes) // len(tokens.lengths)
        for s, (n, k) in enumerate(zip(sizes, keep, strict=True)):
            (_, h, w), *more = tokens.parts[s // segments]
            kept += [start + at for at in (even_grid(h, w, k) if not more and n == h * w else centres(n, k))]
            start += n
        return Keep(order[uploaded(kept, order.device)].sort().values, lengths)


def even(parts: Parts, k: int) -> list[int]:
    """k indices spread evenly over the rasters of an image, which share k in proportion to their sizes."""
    sizes = [size_of((part,)) for part in parts]
    shares = (
        Budget({"total": k}).counts(sizes, (0,) * len(sizes)) if k >= len(sizes) else (0,) * (len(sizes) - 1) + (k,)
    )
    kept, start = list[int](), 0
    for (t, h, w), n, share in zip(parts, sizes, shares, strict=True):
        if share:
            kept += [start + at for at in even_grid(t * h, w, share)]
        start += n
    return kept


def centres(n: int, k: int) -> list[int]:
    """k different whole numbers in 0..n-1, at the centres of k equal parts (k <= n)."""
    return [(2 * i + 1) * n // (2 * k) for i in range(k)]


def even_grid(height: int, width: int, k: int) -> list[int]:
    """k raster indices spread evenly over a height x width grid, ascending."""
    rows = min(height, max(-(-k // width), round((k * height / width) ** 0.5), 1))
    base, extra = divmod(k, rows)
    wide = set(centres(rows, extra))
    columns = [centres(width, base + (r in wide)) for r in range(rows)]
    return [y * width + x for y, row in zip(centres(height, rows), columns, strict=True) for x in row]
