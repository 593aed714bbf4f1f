"""SparseVLM: keep the tokens that the image-related words of the question attend to, and recycle part of the rest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.pruners._pools import choose, merged, top
from vtoken.stages import Fact, Keep, Pruner, Site, VisualTokens


class SparseVLM(Pruner):
    """The raters are the text tokens after an image that receive more than the average weight from the image's tokens:
    a softmax over that text of the plain dot product of embeddings, averaged over the image's tokens. Before decoder
    layer `layer`, keeps the tokens that the raters attended to most in the layer before, mean over raters and heads.
    With `recycle`, the best 30% of the dropped tokens (and one more) are merged into density-peak clusters of hidden
    states, one cluster per ten of them (and one more); each becomes the plain mean of its members and counts in `keep`.

    This is one cut; the published schedules are three such stages, see the presets. If no text token is above average,
    all of the text after the image rates; if there is none, the first tokens stay.

    Paper: https://arxiv.org/abs/2410.04417. Loops over images (or frames, or crops).
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04417"
    deviations: ClassVar[str] = (
        "Nothing random: the authors add noise to the density; here ties go to the lower index. Counts are exact; "
        "recycled tokens take the places of their centres, the authors put them after the kept ones. Version 2's "
        "corrections of the attention (selected heads, division by RoPE's share) are left out."
    )

    layer: int = Field(
        default=3, ge=1, description="first decoder layer that sees fewer tokens; the authors cut before 3, 7 and 16"
    )
    recycle: bool = Field(
        default=False, description="merge part of the dropped tokens: version 1 does, version 2 does not"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("text_attention"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def query_tokens(self, tokens: VisualTokens) -> list[Tensor]:
        images = tokens.x.float().split(list(tokens.lengths))
        return [above_average(x, text.float()) for x, text in zip(images, tokens.fact("later_text"), strict=True)]

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("text_attention")

    def select(self, tokens: VisualTokens) -> Keep:
        if not self.recycle:
            return super().select(tokens)
        score, home = self.score(tokens), torch.full((len(tokens.x),), -1, device=tokens.x.device)

        def pick(rows: Tensor, k: int) -> Tensor:
            c = recycled(len(rows), k)
            best = rows[top(score[rows], len(rows))]
            kept, pool = best[: k - c], best[k - c :][: pooled(len(rows) - k + c)].sort().values
            if c:
                centre, member = peaks(tokens.x[pool], c)
                home[pool] = pool[centre][member]
                kept = torch.cat([kept, pool[centre]])
            return kept

        keep = choose(self, tokens, pick)
        return keep if keep.lengths == tokens.lengths else merged(keep, home)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Distances between recycled tokens; the segments of an image are counted as one. The cost of finding raters
        depends on the prompt and is left out."""
        pairs = zip(lengths, self.keep.counts(lengths, (0,) * len(lengths)), strict=True)
        pools = [pooled(n - k + recycled(n, k)) for n, k in pairs if k < n and self.recycle]
        return sum(2 * p * p * width for p in pools)


def above_average(x: Tensor, text: Tensor) -> Tensor:
    """Indices of the rows of text [T, D] to which x [N, D] gives more than the average weight; all if none is above."""
    if not len(x) or not len(text):
        return torch.arange(len(text), device=x.device)
    weight = (x @ text.T).softmax(1).mean(0)
    above = weight > weight.mean()
    return (above | ~above.any()).nonzero()[:, 0]


def pooled(dropped: int) -> int:
    """How many of the dropped tokens are recycled."""
    return 3 * dropped // 10 + 1


def recycled(n: int, k: int) -> int:
    """Number of clusters among k tokens that are left of n: one per ten recycled tokens and one more, but at most half
    of the k tokens."""
    return next((c for c in range(1, k // 2 + 1) if pooled(n - k + c) // 10 < c), k // 2)


def peaks(x: Tensor, c: int) -> tuple[Tensor, Tensor]:
    """Density-peak clusters of x [N, D], 1 <= c <= N: the rows of x [c] that are centres, and member [N], the cluster
    of each row.

    The density of a row is exp(-m / D), where m is the mean squared distance to its c nearest rows, itself included.
    Centres are the rows with the largest density times distance to the nearest denser row.
    """
    distance = torch.cdist(x.float(), x.float(), compute_mode="donot_use_mm_for_euclid_dist") / x.shape[1] ** 0.5
    density = (-distance.topk(c, largest=False).values.square().mean(1)).exp()
    order = torch.arange(len(x), device=x.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (order < order[:, None]))
    gap = distance.where(denser, distance.max()).amin(1)
    centre = top(gap * density, c)
    member = distance[:, centre].argmin(1)
    return centre, member.index_copy(0, centre, torch.arange(c, device=x.device))
