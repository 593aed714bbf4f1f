"""Bipartite soft matching, the step that ToMe and its successors share, for all sequences of a batch at once.

Letters: `S` sequences (images, crops or frames), `W` and `V` most tokens that one of them has on side A and side B.
Padding holds the row ΣN, one behind the last.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import nearest_tokens
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens, image_of, keep_all, offsets_of, size_of


@dataclass(frozen=True)
class Pairs:
    """Every second token of a sequence, and its most similar one among the others.

    Attributes:
        a, b: [S, W] and [S, V] packed rows of the two sides, in the order of the sequence.
        partner: [S, W] packed row, of side B, of each token of side A.
        value: [S, W] their cosine, -inf where there is none.
        lead: as in VisualTokens.
    """

    a: Tensor
    b: Tensor
    partner: Tensor
    value: Tensor
    lead: int


class Merged(NamedTuple):
    """`rows` that are left and who goes `into` whom, as in Keep; [ΣN] ranks order what is left of a sequence for its
    next match."""

    rows: Tensor
    into: Tensor
    rank: Tensor


def match(metric: Tensor, order: Tensor, held: Sequence[int], lead: int = 0) -> Pairs:
    """Pairs of [ΣN, d] tokens by cosine; ties go to the first.

    Args:
        order: [ΣN] packed rows, sequence by sequence, in the order in which the sides are dealt out: with a token in
            front (`lead`, of side A, never merged) the first goes to side B.
        held: tokens per sequence.
    """
    device = order.device
    rows, columns = seats(held, device)
    grid = torch.full((len(held), max(2, *held)), len(order), device=device)
    grid[rows, columns] = order
    a, b = grid[:, lead % 2 :: 2], grid[:, (lead + 1) % 2 :: 2]
    (at, a_ends), (to, b_ends) = (_taken(held, (lead + k) % 2, side.shape[1], device) for k, side in ((0, a), (1, b)))
    mine, theirs = a.flatten()[at], b.flatten()[to]
    cosine, best = nearest_tokens(metric[mine], metric[theirs], a_ends, b_ends)
    value, partner = cosine.new_full((a.numel(),), -torch.inf), a.flatten().clone()
    # Nobody to join: the value says so.
    partner[at] = theirs[best] if len(theirs) else mine
    value[at] = cosine
    return Pairs(a, b, partner.view_as(a), value.view_as(a), lead)


def _taken(held: Sequence[int], first: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which of the [S x width] seats of one side, every second token from `first` on, are taken, and packed offsets of
    them, on the host."""
    rows, columns = seats(held, torch.device("cpu"))
    mine = columns % 2 == first
    seat = rows[mine] * width + columns[mine] // 2
    return seat.to(device, non_blocking=True), offsets_of([(n + 1 - first) // 2 for n in held], rows.device)


def merge(pairs: Pairs, held: Sequence[int], taken: Sequence[int], anew: bool = False) -> Merged:
    """Lets the `taken` most similar of side A join their partners, in every sequence.

    Ranks: first what is left of side A (by similarity; with a token in front in the old order), then side B. A sequence
    in which nothing merged keeps its order. With `anew` side A stays in the old order, and no sequence keeps its own.
    """
    n, device = sum(held), pairs.a.device
    count = torch.tensor(taken, device=device)[:, None]
    best = pairs.value.sort(dim=1, descending=True, stable=True).indices
    across_a, across_b = (torch.arange(side.shape[1], device=device).expand_as(side) for side in (pairs.a, pairs.b))
    nth = torch.empty_like(best).scatter_(1, best, across_a)
    home = torch.arange(n + 1, device=device)
    home[pairs.a] = torch.where(nth < count, pairs.partner, pairs.a)
    left = across_a if pairs.lead or anew else nth
    dealt = count >= 0 if anew else count > 0
    rank = torch.zeros_like(home)
    rank[pairs.a] = torch.where(dealt, left, 2 * across_a + pairs.lead % 2)
    rank[pairs.b] = torch.where(dealt, left.shape[1] + across_b, 2 * across_b + (pairs.lead + 1) % 2)
    home = home[:n]
    stays = home == torch.arange(n, device=device)
    index = stays.byte().sort(descending=True, stable=True).indices[: n - sum(taken)]
    return Merged(index, (stays.cumsum(0) - 1)[home], rank[:n])


def seats(held: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """[ΣN] sequence of each token, and its place there."""
    rows = image_of(held, device)
    return rows, torch.arange(len(rows), device=device) - offsets_of(held, device)[:-1].long()[rows]


class Merger(Compressor):
    """What ToMe and DToMe share: one match in every layer they act at, by the head mean of its keys; each picture
    (crop) is a sequence of its own. Ranks are remembered by place, so that other stages may drop tokens in between."""

    site: ClassVar[Site] = "encoder"
    anew: ClassVar[bool] = False  # as in `merge`

    proportional: bool = Field(default=True, description="keys of later layers count as often as they have members")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("mean_key"),)

    def merge_point(self) -> Literal["plain", "proportional"]:
        return "proportional" if self.proportional else "plain"

    def taken(self, value: Tensor, held: Sequence[int], at: int) -> tuple[int, ...]:
        """Merges per sequence.

        Args:
            value: [S, W] similarity of each pair, -inf where there is none.
            held: tokens per sequence; at most half of them merge.
            at: layer (0 outside a model) or round.
        """
        raise NotImplementedError

    def select(self, tokens: VisualTokens) -> Keep:
        device = tokens.x.device
        image = image_of(tokens.lengths, device)
        at = offsets_of([size_of(parts) for parts in tokens.parts], device)[:-1].long()[image] + tokens.raster_index
        order = torch.arange(len(image), device=device)
        known: dict[str, Any] = tokens.memory
        if "rank" in known:
            order = torch.argsort(image * len(known["rank"]) + known["rank"][at])
        pairs = match(tokens.fact("mean_key"), order, tokens.lengths, tokens.lead)
        taken = self.taken(pairs.value, tokens.lengths, tokens.layer or 0)
        if not any(taken):
            return keep_all(tokens)
        index, into, rank = merge(pairs, tokens.lengths, taken, self.anew)
        known.setdefault("rank", at.new_zeros(sum(map(size_of, tokens.parts))))[at] = rank
        return Keep(index, tuple(n - r for n, r in zip(tokens.lengths, taken, strict=True)), into, tokens.size)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities and means; `width` is that of one head."""
        return sum(n * n // 2 + 2 * n for n in lengths) * width
