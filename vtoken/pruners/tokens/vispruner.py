"""VisPruner: part of the tokens by CLS attention, part by how little they resemble others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens

STEP = 8


class VisPruner(Pruner):
    """`important` percent of the tokens to keep are those with the highest CLS attention. The others, in order of
    falling attention, are thinned out, 8 at a time (fewer in the last round, or when fewer are left): each token at an
    even place (0, 2, ...) is compared with all at odd places (cosine of encoder features), those with the highest
    maximum go, and the list becomes the even ones left, most similar first, then the odd ones.

    Paper: https://arxiv.org/abs/2412.01818 (v2; v1 is FasterVLM). Loops over images and rounds. All cosines of an
    image are computed once (4 N^2 bytes); `nearest_tokens` gives what a round asks for, but would compute its cosines
    afresh each time.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.01818"
    deviations: ClassVar[str] = (
        "A list of odd length is halved with the longer half at even places, where the authors' code raises or drops "
        "one too many. Similarities are float32."
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
            ranked = rows[top(attention[rows], len(rows))]
            rest = ranked[count:]
            return torch.cat([ranked[:count], rest[thinned(normalize(features[rest].float(), dim=-1), k - count)]])

        return choose(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """All similarities, at the model's width; segments of an image are taken together."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        left = [n - k * self.important // 100 for n, k in zip(lengths, counts, strict=True) if k < n]
        return sum(2 * n * n * width for n in left)


def thinned(x: Tensor, k: int) -> Tensor:
    """[k] of the rows x [n, D] (unit length) that are left; k <= n."""
    if not k:
        return torch.arange(0, device=x.device)
    cosine, left = x @ x.T, torch.arange(len(x), device=x.device)
    while len(left) > k:
        even, odd = left[::2], left[1::2]
        drop = min(STEP, len(left) - k, len(even))
        similar = cosine[even[:, None], odd].amax(1)
        left = torch.cat([even[top(similar, len(even))[drop:]], odd])
    return left
