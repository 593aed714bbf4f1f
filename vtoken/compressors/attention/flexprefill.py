"""FlexPrefill: every head chooses, from its last queries, which key blocks the prefill reads."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.compressors.attention._blocks import best, block_mean, block_sum, cover
from vtoken.kernels import pooled_scores
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, everything
from vtoken.stages.query_attention import shared


class FlexPrefill(SparseAttention):
    """The attention of the last `size` queries stands for that of all, summed per key (vertical) and per distance
    (slash). As many key blocks are read as the heaviest keys with `gamma` of the mass would fill, the heaviest blocks
    first, and likewise blocks of distances: at least `min_budget` tokens' worth of each, at most `max_budget`, and
    always the first block and the diagonal.

    A head is query-aware if block means predict the attention of these queries well (root of the Jensen-Shannon
    divergence of the two below `tau`). It reads only `min_budget` of keys and of distances, plus the pairs of blocks
    that hold `gamma` of the softmaxed products of all block means. With tau 0 every head is vertical-slash. Prompts of
    at most two blocks, or of `min_budget` tokens, are read whole.

    The choice assumes that the last `size` tokens represent the prompt: with a short question, they are image tokens
    and the chat template.

    Paper: https://arxiv.org/abs/2502.20766
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2502.20766"
    deviations: ClassVar[str] = (
        "The entry that crosses gamma counts, as in the paper; the authors' code drops it in query-aware heads "
        "(drop_crossing). Blocks of other sizes than 128 are counted in their own size, where the code divides by 128. "
        "Probabilities of 0 add nothing to the divergence, where the code gets NaN. The attention's own scale is used "
        "for scoring too."
    )

    gamma: float = Field(default=0.95, gt=0, le=1, description="share of the attention that has to be covered")
    tau: float = Field(
        default=0.1, ge=0, description="heads with a smaller divergence also follow pooled queries and keys"
    )
    min_budget: int = Field(
        default=1024, ge=1, description="verticals, and slashes, cover at least this many tokens (authors' function: 1)"
    )
    max_budget: int | None = Field(
        default=None, ge=1, description="verticals, and slashes, cover at most this many tokens"
    )
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")
    drop_crossing: bool = Field(
        default=False, description="leave out the entry that crosses gamma in query-aware heads, as the authors' code"
    )

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_budget is not None and self.max_budget < self.min_budget:
            raise ValueError(
                f"max_budget {self.max_budget} is below min_budget {self.min_budget}; raise it, or lower that"
            )
        return self

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, size = prompt.length, self.size
        if n <= max(2, -(-self.min_budget // size)) * size:
            return SparseMask(size, everything(prompt.heads, n, n, size, prompt.q.device))
        attention = shared(prompt.query_attention, prompt.q, prompt.k, prompt.scale)
        vertical, slash = (x / size for x in attention.lines(size))
        parts = zip(attention.heads(), vertical, slash, strict=True)
        return SparseMask(size, torch.cat([self._blocks(q, k, v, s, prompt.scale) for (q, k), v, s in parts]))

    def _blocks(self, q: Tensor, k: Tensor, vertical: Tensor, slash: Tensor, scale: float) -> Tensor:
        """[H, T, T] blocks for the query heads [H, N, d] of one key head [1, N, d]. `vertical` and `slash` are [H, N]
        each: the mean attention of the last queries to every key and to every distance."""
        size = self.size
        # Distances are pooled from the far end, so that an incomplete block holds the longest ones.
        columns, bands = block_sum(vertical, size), block_sum(slash.flip(-1), size).flip(-1)
        t = columns.shape[-1]
        least = min(-(-self.min_budget // size), t)
        most = t if self.max_budget is None else min(-(-self.max_budget // size), t)
        means = block_mean(k, size)
        pooled = q[:, -size:].float().mean(1) @ means[0].T * scale
        aware = divergence(pooled.softmax(-1), columns) < self.tau

        def count(x: Tensor) -> Tensor:
            needed = (x.sort(-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1) + 1
            return torch.where(aware, least, (needed // size + 1).clamp(min=least)).clamp(max=most)

        columns[:, 0] = bands[:, 0] = torch.inf
        taken, near = best(columns, count(vertical)), best(bands, count(slash))
        row = torch.arange(t, device=q.device)
        distance = row[:, None] - row
        blocks = (taken[:, None] | near[:, distance.clamp(min=0)]) & (distance >= 0)
        if self.tau > 0:
            entries = pooled_scores(q[None], k[None], size, scale, means=means[None])[0].flatten(1)
            covered = cover(entries, self.gamma, self.drop_crossing).view_as(blocks) & (distance >= 0)
            blocks |= covered & aware[:, None, None]
        return blocks


def divergence(a: Tensor, b: Tensor) -> Tensor:
    """Root of the Jensen-Shannon divergence over the last axis, natural logarithm."""
    m = (a + b) / 2
    terms = a.xlogy(a) + b.xlogy(b) - (a + b).xlogy(m)
    return (terms.sum(-1) / 2).clamp(min=0).sqrt()
