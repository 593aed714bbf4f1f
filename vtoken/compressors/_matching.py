"""Bipartite soft matching, the step that ToMe and its successors share, for all sequences of a batch at once.

Letters: `S` sequences (images, crops or frames); `W` and `V` largest number of tokens of a sequence on side A and on
side B. Padding holds the row ΣN, one past the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels import nearest_tokens
from vtoken.stages import (
    Compressor,
    Fact,
    Keep,
    Site,
    VisualTokens,
    image_of,
    keep_all,
    offsets_of,
    place_in_image,
    size_of,
    uploaded,
)


@dataclass(frozen=True)
class Pairs:
    """Each token of side A (every second token of a sequence), with the most similar token of side B.

    Attributes:
        a, b: [S, W] and [S, V] packed rows of the two sides, in the order of the sequence.
        partner: [S, W] packed row, on side B, of the partner of each token on side A.
        value: [S, W] their cosine similarity, -inf if there is no partner.
        lead: as in VisualTokens.
        padded: `a` and `b` may hold padding.
    """

    a: Tensor
    b: Tensor
    partner: Tensor
    value: Tensor
    lead: int
    padded: bool


class Merged(NamedTuple):
    """The `rows` [ΣK] that are left, `into` as in Keep, and the `order` [ΣK] in which the tokens left are dealt to the
    sides at the next match, sequence by sequence."""

    rows: Tensor
    into: Tensor
    order: Tensor


def match(metric: Tensor, order: Tensor, lengths: Sequence[int], lead: int = 0) -> Pairs:
    """Pairs of [ΣN, d] tokens by cosine similarity; ties go to the first.

    Args:
        order: [ΣN] packed rows, sequence by sequence, in the order in which tokens are dealt to the two sides.
        lengths: tokens per sequence.
        lead: tokens in front of each sequence, dealt but never merged: with one, the first token goes to side B.
    """
    unit, first = normalize(metric.float(), dim=-1), lead % 2
    if len(set(lengths)) == 1 and lengths[0] > 1:
        rows, tokens = (x.unflatten(0, (len(lengths), -1)) for x in (order, unit[order]))
        a, b = rows[:, first::2], rows[:, 1 - first :: 2]
        a_ends, b_ends = (offsets_of([side.shape[1]] * len(lengths), torch.device("cpu")) for side in (a, b))
        mine, theirs = tokens[:, first::2].flatten(0, 1), tokens[:, 1 - first :: 2].flatten(0, 1)
        value, best = nearest_tokens(mine, theirs, a_ends, b_ends, unit=True)
        return Pairs(a, b, b.flatten()[best].view_as(a), value.view_as(a), lead, padded=False)
    device = order.device
    sequence, place = seats(lengths, device)
    grid = torch.full((len(lengths), max(2, *lengths)), len(order), device=device)
    grid[sequence, place] = order
    a, b = grid[:, first::2], grid[:, 1 - first :: 2]
    (at, a_ends), (to, b_ends) = (
        _taken(lengths, (lead + k) % 2, side.shape[1], device) for k, side in ((0, a), (1, b))
    )
    mine, theirs = a.flatten()[at], b.flatten()[to]
    cosine, best = nearest_tokens(unit[mine], unit[theirs], a_ends, b_ends, unit=True)
    value, partner = cosine.new_full((a.numel(),), -torch.inf), a.flatten().clone()
    # Tokens without a partner are marked by their value, -inf.
    partner[at] = theirs[best] if len(theirs) else mine
    value[at] = cosine
    return Pairs(a, b, partner.view_as(a), value.view_as(a), lead, padded=True)


def _taken(lengths: Sequence[int], first: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Flat indices of the [S, width] seats of one side (every second token from `first` on) that are not padding, and
    packed offsets of the sequences among them, on the host."""
    rows, columns = seats(lengths, torch.device("cpu"))
    mine = columns % 2 == first
    seat = rows[mine] * width + columns[mine] // 2
    return seat.to(device, non_blocking=True), offsets_of([(n + 1 - first) // 2 for n in lengths], rows.device)


def merge(pairs: Pairs, lengths: Sequence[int], taken: Sequence[int], places: Tensor, anew: bool = False) -> Merged:
    """Merges into their partners the `taken[s]` tokens of side A of sequence s that are most similar to them. `places`
    [ΣN or more]: 0, 1, ...

    The next order is the rest of side A (by similarity; with `lead` or `anew`, in the old order), then side B. A
    sequence in which nothing merged keeps its order, unless `anew`.
    """
    ranked = pairs.value.sort(dim=1, descending=True, stable=True).indices
    most = max(taken)
    places = places[: sum(lengths)]
    if not pairs.padded and min(taken) == most:
        joining = ranked[:, :most]
        home = places.scatter(0, pairs.a.gather(1, joining).flatten(), pairs.partner.gather(1, joining).flatten())
        rows, into = survivors(home, places, most * len(taken))
        rest = ranked[:, most:].sort(1).values if pairs.lead or anew else ranked[:, most:]
        return Merged(rows, into, into[torch.cat([pairs.a.gather(1, rest), pairs.b], 1).flatten()])
    device, sides = ranked.device, (pairs.a, pairs.b)
    count = uploaded(taken, device)[:, None]
    across_a, across_b = (torch.arange(side.shape[1], device=device).expand_as(side) for side in sides)
    nth = torch.empty_like(ranked).scatter_(1, ranked, across_a)
    home = torch.arange(sum(lengths) + 1, device=device)
    home[pairs.a] = torch.where(nth < count, pairs.partner, pairs.a)
    left = across_a if pairs.lead or anew else nth
    dealt = count >= 0 if anew else count > 0
    rank, owner = torch.zeros_like(home), torch.zeros_like(home)
    rank[pairs.a] = torch.where(dealt, left, 2 * across_a + pairs.lead % 2)
    rank[pairs.b] = torch.where(dealt, left.shape[1] + across_b, 2 * across_b + (pairs.lead + 1) % 2)
    for side in sides:
        owner[side] = torch.arange(len(side), device=device)[:, None].expand_as(side)
    rows, into = survivors(home[:-1], places, sum(taken))
    return Merged(rows, into, torch.argsort(owner[rows] * len(home) + rank[rows]))


def survivors(home: Tensor, places: Tensor, gone: int) -> tuple[Tensor, Tensor]:
    """[ΣK] rows that are their own `home` [ΣN], and [ΣN] which of these each row goes into; `places` [ΣN]: 0, 1, ..."""
    into = ((home == places).cumsum(0) - 1)[home]
    return torch.empty_like(home[gone:]).scatter_(0, into, home), into


def seats(lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """[ΣN] sequence of each token, and its index in that sequence."""
    return image_of(lengths, device), place_in_image(lengths, device)


@dataclass
class Order:
    """The order in which the tokens that a decision left are dealt to the sides at the next match.

    Attributes:
        rows: [ΣK] the tokens in this order; lengths: how many per sequence.
        kept: [ΣK] their packed rows before the decision; raster_index: [ΣN] as it was then; places: 0, 1, ...
    """

    rows: Tensor
    lengths: tuple[int, ...]
    kept: Tensor
    raster_index: Tensor
    places: Tensor

    def now(self, tokens: VisualTokens) -> Tensor:
        """[ΣK] order of the tokens that are live now; other stages may have dropped some in between."""
        if self.lengths == tokens.lengths:
            return self.rows
        device, sizes = self.rows.device, [size_of(parts) for parts in tokens.parts]
        start, live = offsets_of(sizes, device)[:-1], image_of(tokens.lengths, device)
        rank = torch.empty_like(self.rows).scatter_(0, self.rows, self.places[: len(self.rows)])
        by_place = rank.new_zeros(sum(sizes))
        by_place[start[image_of(self.lengths, device)] + self.raster_index[self.kept]] = rank
        return torch.argsort(live * len(rank) + by_place[start[live] + tokens.raster_index])


class Merger(Compressor):
    """Shared by ToMe and DToMe: one match in every layer at which they act, by the mean of the keys over heads; each
    picture (crop) is a sequence of its own."""

    site: ClassVar[Site] = "encoder"
    anew: ClassVar[bool] = False  # as in `merge`

    proportional: bool = Field(default=True, description="later layers count the key of a merged token once per member")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("mean_key"),)

    def merge_point(self) -> Literal["plain", "proportional"]:
        return "proportional" if self.proportional else "plain"

    def taken(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        """Number of merges per sequence.

        Args:
            value: [S, W] similarity of each pair, -inf if there is none.
            lengths: tokens per sequence; at most half of them merge.
            at: layer (0 outside a model) or round.
        """
        raise NotImplementedError

    def select(self, tokens: VisualTokens) -> Keep:
        known: Order | None = tokens.memory.get("order")
        places = torch.arange(len(tokens.x), device=tokens.x.device) if known is None else known.places
        order = places if known is None else known.now(tokens)
        pairs = match(tokens.fact("mean_key"), order, tokens.lengths, tokens.lead)
        taken = self.taken(pairs.value, tokens.lengths, tokens.layer or 0)
        if not any(taken):
            return keep_all(tokens)
        rows, into, order = merge(pairs, tokens.lengths, taken, places, self.anew)
        lengths = tuple(n - r for n, r in zip(tokens.lengths, taken, strict=True))
        tokens.memory["order"] = Order(order, lengths, rows, tokens.raster_index, places)
        return Keep(rows, lengths, into, tokens.size, complete=True)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities and means; `width` is that of one head."""
        return sum(n * n // 2 + 2 * n for n in lengths) * width
