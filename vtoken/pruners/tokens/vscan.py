"""VScan, stage 1: the best of every window in an early layer, the best overall in the last, and merging of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose, merged, rest_of, top
from vtoken.stages import Fact, Keep, Parts, Pruner, VisualTokens


class VScan(Pruner):
    """Half of the tokens to keep (rounded down) come from a local scan in rounds by the CLS attention of an early
    layer: the best token of every window, then the second best of every window, and so on; the last round, which cannot
    include all windows, goes by attention. The other half are the remaining tokens with the highest CLS attention in
    the feature layer. Every dropped token is merged into the kept token with the most similar projected embedding
    (cosine), as a plain mean. Windows at the lower and right edge include what is left over; rasters and frames have
    windows of their own.

    Paper: https://arxiv.org/abs/2505.22654. Loops over images (or frames, or crops). The second stage, a cut to a third
    in the middle of the LLM, is `vscan_late`: with it, the authors' average over layers is two thirds of `keep`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    deviations: ClassVar[str] = (
        "When windows do not divide the local half evenly, the count is still exact; the authors' LLaVA code keeps "
        "fewer. Kept tokens stay in reading order."
    )

    local_layer: int = Field(
        default=5,
        description="encoder layer of the local scan; on Qwen2.5-VL the next one with full attention is read, 7, as in "
        "the authors' code",
    )
    window: int = Field(default=6, ge=1, description="side of a window in tokens; on Qwen2.5-VL the authors take 4")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention", self.local_layer), Fact("cls_attention"))

    def select(self, tokens: VisualTokens) -> Keep:
        early, late = (tokens.fact(need.name, need.layer) for need in self.needs())
        windows, x = self._windows(tokens), normalize(tokens.x.float(), dim=-1)
        home = torch.full_like(windows, -1)

        def pick(rows: Tensor, k: int) -> Tensor:
            local = in_rounds(early[rows], windows[rows], k // 2)
            overall = top(late[rows].index_fill(0, local, -torch.inf), k - k // 2)
            chosen = torch.cat([local, overall]).sort().values
            others = rows[rest_of(len(rows), chosen)]
            home[others] = rows[chosen][(x[others] @ x[rows[chosen]].T).argmax(1)]
            return rows[chosen]

        keep = choose(self, tokens, pick)
        return keep if keep.lengths == tokens.lengths else merged(keep, home)

    def _windows(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] window of each token, numbered within its image."""
        places = tokens.raster_index.split(list(tokens.lengths))
        return torch.cat([self._of_image(place, parts) for place, parts in zip(places, tokens.parts, strict=True)])

    def _of_image(self, place: Tensor, parts: Parts) -> Tensor:
        out, before, numbered = torch.zeros_like(place), 0, 0
        for t, h, w in parts:
            down, across = max(1, h // self.window), max(1, w // self.window)
            p = place - before
            y, x = (p // w % h // self.window).clamp(max=down - 1), (p % w // self.window).clamp(max=across - 1)
            out = torch.where(p >= 0, (p // (h * w) * down + y) * across + x + numbered, out)
            before, numbered = before + t * h * w, numbered + t * down * across
        return out

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities and the merge; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (k + 1) * width for n, k in zip(lengths, counts, strict=True) if k < n)


def in_rounds(score: Tensor, window: Tensor, k: int) -> Tensor:
    """[k] positions: first the best of every window, then the second best of every window, and so on; within a round by
    score."""
    by_score = top(score, len(score))
    order = by_score[window[by_score].sort(stable=True).indices]
    sorted_window = window[order]
    rank = torch.arange(len(order), device=order.device) - torch.searchsorted(sorted_window, sorted_window)
    place = torch.empty_like(rank).index_copy_(0, order, rank)
    return by_score[place[by_score].sort(stable=True).indices][:k]
