"""Prediction of tokens from their neighbours' pixels."""

from __future__ import annotations

import torch
from torch import Tensor

Sizes = tuple[Tensor, Tensor]


def unpredicted(x: Tensor, threshold: float, metric: str) -> Tensor:
    """[h, w] bool: which tokens of a raster x [h, w, P] are not like their prediction, see PixelPrune."""
    h, w = x.shape[:2]
    return (
        exact(x) if threshold == 0 else along_diagonals(x, threshold, metric)[0] if h * w > 1 else x.new_ones(h, w) > 0
    )


def exact(x: Tensor) -> Tensor:
    """`unpredicted` for threshold 0. Alike means equal, so what would be rebuilt of a neighbour is its own pixels."""
    kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    left = (x[:, 1:] == x[:, :-1]).all(-1)  # [h, w - 1]: whether a token equals its left neighbour
    above = (x[1:] == x[:-1]).all(-1)
    kept[0, 1:] = ~left[0]
    kept[1:, 0] = ~above[:, 0]
    use_above = above[:, :-1] & ~left[:-1]
    kept[1:, 1:] = ~torch.where(use_above, above[:, 1:], left[1:])
    return kept


def along_diagonals(x: Tensor, threshold: float, metric: str) -> tuple[Tensor, Tensor]:
    """[h, w] bool as in `unpredicted`, and [h, w, P] the rebuilt raster. Tokens depend on earlier anti-diagonals alone,
    so one step decides a whole anti-diagonal: h + w - 2 steps."""
    h, w = x.shape[:2]
    kept = torch.ones(h, w, dtype=torch.bool, device=x.device)
    rebuilt = x.clone()

    def alike(a: Tensor, b: Tensor) -> Tensor:
        return distance(a, b, metric) <= threshold

    rows = torch.arange(h, device=x.device)
    for step in range(1, h + w - 1):
        r = rows[max(0, step - w + 1) : min(h, step + 1)]
        c = step - r
        # Without a left (upper) neighbour, the other one stands in for it and for the corner.
        left = rebuilt[torch.where(c > 0, r, r - 1), (c - 1).clamp(min=0)]
        above = rebuilt[(r - 1).clamp(min=0), torch.where(r > 0, c, c - 1)]
        corner = rebuilt[(r - 1).clamp(min=0), (c - 1).clamp(min=0)]
        inner = (r > 0) & (c > 0)
        use_above = inner & alike(corner, left) & ~alike(corner, above)
        prediction = torch.where(use_above[:, None], above, left)
        new = ~alike(x[r, c], prediction)
        kept[r, c] = new
        rebuilt[r, c] = torch.where(new[:, None], x[r, c], prediction)
    return kept, rebuilt


def distance(a: Tensor, b: Tensor, metric: str) -> Tensor:
    """[...] distance between pixels a and b [..., P]."""
    gap = (a - b).abs()
    if metric == "max":
        return gap.amax(-1)
    return gap.mean(-1) if metric == "mae" else gap.square().mean(-1).sqrt()
