"""VMTC: keep the tokens the vision encoder attends to, and one mean token per cluster of the others. Experimental."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose, merged, rest_of, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens


class VMTC(Pruner):
    """Of the K tokens, one in `one_in` (at least one if K > 1) is a cluster; the others are the tokens with the highest
    CLS attention. The remaining tokens are clustered by spherical k-means (cosine similarity of the visual tokens as
    they enter the LLM, seeded with tokens evenly spaced in reading order). Each cluster becomes its mean weighted by
    CLS attention, at the place of its member with the highest attention. If a cluster is empty, the best remaining
    token stays in its place, so K is exact.

    Experimental: a reconstruction from the paper's abstract and reviews. No code was published; the split, the seeds
    and the iterations are chosen here. Do not quote it as the authors' result.

    Paper: https://arxiv.org/abs/2411.15453.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.15453"
    deviations: ClassVar[str] = "A reconstruction; clusters projected tokens."

    one_in: int = Field(default=6, ge=1, description="one kept token in this many is a cluster of the others")
    iterations: int = Field(default=10, ge=1, description="rounds of k-means")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        """Loops over images (frames, crops)."""
        # Clusters without any attention are plain means, not 0 / 0.
        attention = tokens.fact("cls_attention").clamp(min=1e-12)
        home = torch.full_like(attention, -1, dtype=torch.long)
        weight = torch.ones_like(attention)

        def pick(rows: Tensor, k: int) -> Tensor:
            clusters = self._clusters(k)
            primary = top(attention[rows], k - clusters)
            if not clusters:
                return rows[primary]
            rest = rows[rest_of(len(rows), primary)]
            x = normalize(tokens.x[rest].float(), dim=-1)
            kept, into = condense(k_means(x, clusters, self.iterations), attention[rest], clusters)
            home[rest], weight[rest] = rest[into], attention[rest]
            return torch.cat([rows[primary], rest[kept]])

        keep = choose(self, tokens, pick)
        return keep if keep.lengths == tokens.lengths else merged(keep, home, weight)

    def _clusters(self, k: int) -> int:
        """Number of clusters among k kept tokens."""
        return max(k // self.one_in, 1) if k > 1 else 0

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities of k-means, and the merge; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        rounds = self.iterations + 1
        return sum(
            2 * n * (rounds * self._clusters(k) + 1) * width for n, k in zip(lengths, counts, strict=True) if k < n
        )


def k_means(x: Tensor, clusters: int, iterations: int) -> Tensor:
    """[N] cluster of each row of the normalised x [N, D], by cosine similarity to the cluster's mean direction; ties to
    the lower index. The centre of an empty cluster is 0, so it attracts rows that point away from all other centres."""
    seeds = (2 * torch.arange(clusters, device=x.device) + 1) * len(x) // (2 * clusters)
    centre = x[seeds]
    cluster = (x @ centre.T).argmax(1)
    for _ in range(iterations):
        total = torch.zeros_like(centre).index_add_(0, cluster, x)
        centre = normalize(total, dim=-1)
        cluster = (x @ centre.T).argmax(1)
    return cluster


def condense(cluster: Tensor, score: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """kept [clusters]: the highest-scoring member of each cluster (ties to the lower index), and for every empty
    cluster the best token that is not among these; into [N]: the kept token that absorbs each token."""
    order = score.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order), device=order.device)
    best = rank.new_full((clusters,), len(order) - 1).scatter_reduce_(0, cluster, rank, "amin")
    into = order[best[cluster]]
    leads = into == torch.arange(len(into), device=into.device)
    kept = top(score.masked_fill(leads, torch.inf), clusters)
    into[kept] = kept
    return kept, into
