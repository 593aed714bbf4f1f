"""FoPru: keep the tokens, or whole rows of them, that receive the most attention in the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, VisualTokens


class FoPru(Pruner):
    """Scores a token by the attention it receives, averaged over heads and over all queries (CLS among them). `rank`
    keeps the highest scores. `row` ranks the rows of the picture by the mean score of their tokens, keeps whole rows
    while they fit the budget, and fills the budget up with the highest tokens of the next row. Frames and the two
    rasters of an anyres image have rows of their own; with {per_crop: K}, a row ends where its crop ends.

    Paper: https://arxiv.org/abs/2411.14164. No code was published, and the paper leaves layer, CLS and rounding open.
    Chosen here: the feature layer, CLS among the queries, and exact counts.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.14164"
    deviations: ClassVar[str] = (
        "No code to compare with. A budget that is not a multiple of the row's width is filled from the next row."
    )

    strategy: Literal["rank", "row"] = Field(
        default="rank", description="rank: single tokens; row: rows of the picture"
    )
    layer: int | None = Field(
        default=None, description="encoder layer whose attention counts; null: the one the features come from"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("received_attention", self.layer),)

    def score(self, tokens: VisualTokens) -> Tensor:
        score = tokens.fact("received_attention", self.layer)
        return score if self.strategy == "rank" else by_row(score, self._rows(tokens))

    def _rows(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] number of each token's row, counted over the whole batch. Loops over images and their rasters."""
        rows, start, before = [], 0, 0
        for n, parts in zip(tokens.lengths, tokens.parts, strict=True):
            place, first = tokens.raster_index[start : start + n], 0
            row = torch.zeros_like(place)
            for t, h, w in parts:
                row = torch.where(place >= first, before + (place - first) // w, row)
                first, before = first + t * h * w, before + t * h
            rows.append(row)
            start += n
        packed = torch.cat(rows)
        if self.keep.per is None or tokens.segment is None:
            return packed
        segment = self._segments(tokens)
        return segment * before + packed

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """The means of the rows."""
        return sum(lengths) if self.strategy == "row" else 0


def by_row(score: Tensor, row: Tensor) -> Tensor:
    """[ΣN] minus the rank of each token, with rows sorted by mean score, and tokens within a row by score."""
    total = score.new_zeros(2, int(row.max()) + 1, dtype=torch.float64)
    total.index_add_(1, row, torch.stack([score.double(), torch.ones_like(score, dtype=torch.float64)]))
    mean = (total[0] / total[1])[row]
    order = score.argsort(descending=True, stable=True)
    order = order[row[order].argsort(stable=True)]
    order = order[mean[order].argsort(descending=True, stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    return -rank.float()  # exact up to 2^24 tokens
