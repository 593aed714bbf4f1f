"""Density peaks (DPC-kNN): clusters whose centres are dense, and far from anything denser. Shared by video methods."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.stages import image_of, offsets_of, place_in_image, uploaded

POOLS = 32  # pools compared at a time; bounds the memory


def density_peaks(
    x: Tensor, lengths: Sequence[int], counts: Sequence[int], neighbours: int, limited: bool = True
) -> Tensor:
    """[ΣN] packed row of the centre that each row of x [ΣN, D] joins, itself for a centre; -1 in pools without centres.

    The density of a row is exp(-m / D), where m is the mean squared distance to its `neighbours` nearest rows, itself
    included; if `limited`, to at most as many as its pool has centres. Rows are ranked by density times the distance to
    the nearest denser row (the densest: times the largest distance in the pool). The highest ranks are centres, every
    other row joins its nearest centre. Ties of density and rank go to the lower row. Does not wait for the device.

    Args:
        lengths, counts: rows and centres of each pool, on the host; 0 <= count <= length.
    """
    parts, start = [], 0
    for at in range(0, len(lengths), POOLS):
        size, some = list(lengths[at : at + POOLS]), counts[at : at + POOLS]
        rows = sum(size)
        if list(some) == size:
            parts.append(torch.arange(start, start + rows, device=x.device))
        else:
            most = [neighbours if n and not limited else min(k, neighbours) for n, k in zip(size, some, strict=True)]
            parts.append(_peaks(x[start : start + rows].float(), size, some, most, start))
        start += rows
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=x.device)


def _peaks(x: Tensor, lengths: Sequence[int], counts: Sequence[int], neighbours: Sequence[int], start: int) -> Tensor:
    """density_peaks of at most POOLS pools, with a number of neighbours for each; the first row has number `start`."""
    device, longest = x.device, max(lengths)
    pool, place = image_of(lengths, device), place_in_image(lengths, device)
    seats = x.new_zeros(len(lengths), longest, x.shape[1])
    seats[pool, place] = x
    across = torch.arange(longest, device=device)
    size, count = uploaded(lengths, device)[:, None], uploaded(counts, device)[:, None]
    real = across < size
    apart = (torch.cdist(seats, seats) / x.shape[1] ** 0.5).masked_fill(~real[:, None], torch.inf)
    apart = apart.diagonal_scatter(apart.new_zeros(len(lengths), longest), dim1=1, dim2=2)
    near = apart.topk(min(longest, max(1, *neighbours)), dim=2, largest=False).values.square()
    asked = uploaded([max(1, min(n, k)) for n, k in zip(lengths, neighbours, strict=True)], device)[:, None]
    beyond = torch.arange(near.shape[2], device=device) >= asked[..., None]
    density = (-near.masked_fill(beyond, 0).sum(2) / asked).exp()
    other, mine = density[:, None], density[..., None]
    denser = (other > mine) | ((other == mine) & (across < across[:, None]))
    farthest = apart.masked_fill(~(real[:, None] & real[..., None]), 0).flatten(1).amax(1)[:, None, None]
    reach = torch.where(denser & real[:, None], apart, farthest).amin(2)
    rank = (reach * density).masked_fill(~real, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    most = max(1, *counts)
    centres = rank[:, :most]
    to = apart.gather(2, centres[:, None].expand(-1, longest, -1))
    home = centres.gather(1, to.masked_fill((across[:most] >= count)[:, None], torch.inf).argmin(2))
    nth = torch.empty_like(rank).scatter_(1, rank, across.expand_as(rank))
    home = torch.where(nth < count, across, home)
    home = home + (offsets_of(lengths, device)[:-1].long() + start)[:, None]
    return torch.where(count > 0, home, -1)[pool, place]
