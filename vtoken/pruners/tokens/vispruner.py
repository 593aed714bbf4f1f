"""VisPruner: part of the tokens by CLS attention, part by how little they resemble others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose_alike, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens

STEP = 8  # tokens dropped in a round


class VisPruner(Pruner):
    """`important` percent of the tokens to keep are those with the highest CLS attention. The others, in order of
    falling attention, are thinned out in rounds of 8 (fewer in the last round, or when fewer are left). In each round,
    every token at an even place (0, 2, ...) is compared with all at odd places (cosine of encoder features), and those
    with the highest maximum are dropped; the list becomes the remaining even ones, most similar first, then the odd
    ones.

    Paper: https://arxiv.org/abs/2412.01818 (v2; v1 is FasterVLM). A loop over rounds; images of equal size and budget
    run together. All similarities are computed once (4 N^2 bytes per image); `nearest_tokens` would recompute them in
    every round.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    deviations: ClassVar[str] = (
        "A list of odd length is split with the longer half at even places; the authors' code raises an error or "
        "drops one too many. Similarities are float32."
    )

    important: int = Field(
        default=50,
        ge=0,
        le=100,
        description="percent of the kept tokens that are chosen by attention; the authors take 50, but 75 for 64 "
        "tokens of LLaVA-1.5",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("features"))

    def select(self, tokens: VisualTokens) -> Keep:
        attention, features = tokens.fact("cls_attention"), tokens.fact("features")

        def pick(rows: Tensor, k: int) -> Tensor:
            count = k * self.important // 100
            ranked = rows.gather(1, top(attention[rows], rows.shape[1]))
            rest = ranked[:, count:]
            others = rest.gather(1, thinned(normalize(features[rest].float(), dim=-1), k - count))
            return torch.cat([ranked[:, :count], others], 1)

        return choose_alike(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """All similarities, counted at the model's width; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        left = [n - k * self.important // 100 for n, k in zip(lengths, counts, strict=True) if k < n]
        return sum(2 * n * n * width for n in left)


def thinned(x: Tensor, k: int) -> Tensor:
    """[pools, k] rows that are left of x [pools, n, D] (unit length); k <= n."""
    pools, n, _ = x.shape
    left = torch.arange(n, device=x.device).expand(pools, -1)
    if not k:
        return left[:, :0]
    cosine, pool = torch.bmm(x, x.transpose(1, 2)), torch.arange(pools, device=x.device)[:, None, None]
    while (n := left.shape[1]) > k:
        even, odd = left[:, ::2], left[:, 1::2]
        drop = min(STEP, n - k, even.shape[1])
        similar = cosine[pool, even[:, :, None], odd[:, None]].amax(2)
        left = torch.cat([even.gather(1, top(similar, n)[:, drop:]), odd], 1)
    return left
