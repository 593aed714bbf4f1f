"""PruneSID: groups of tokens by principal components, and of every group the tokens that resemble each other least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose
from vtoken.stages import Fact, Keep, Pruner, VisualTokens, uploaded


class PruneSID(Pruner):
    """Of n tokens k stay. Each token joins the one of the max(1, k // 4) principal components of sigmoid(features) in
    which it weighs most. Within its group tokens are ranked by CLS attention, and one is suppressed if its cosine to a
    higher one that is not suppressed exceeds 18 k / n times the mean cosine of all pairs. Every group keeps one token;
    the others are shared out in proportion to the tokens that are not suppressed, at most 5 ceil(k / 64) to a group
    unless too few are left. Within a group, suppressed tokens are chosen last.

    On Qwen2-VL the authors rank otherwise (`rank: component`): features are the projected embeddings, a token's rank is
    its weight in its component, and the factor of the mean is at least 1.

    Paper: https://arxiv.org/abs/2603.09480. A loop over images (or frames, or crops), each with a decomposition of its
    n x n Gram matrix; groups are shared out on the host, which waits for the device once per image.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2603.09480"
    deviations: ClassVar[str] = (
        "Components are those of an exact decomposition; the authors draw a random one, so that their choice changes "
        "from run to run. The CLS token, which they always keep, is not available: one more patch takes its slot. "
        "Reading order; theirs is group by group. Cosines are float32. With 16 tokens or fewer they keep all on Qwen, "
        "and at least 16. The share that depends on the picture (paper) is not in their code and not here."
    )

    rank: Literal["attention", "component"] = Field(
        default="attention",
        description="attention: as on LLaVA; component: as on Qwen2-VL, by the weight in the component, of embeddings",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("features")) if self.rank == "attention" else ()

    def select(self, tokens: VisualTokens) -> Keep:
        attention = tokens.fact("cls_attention") if self.rank == "attention" else None
        x = (tokens.x if attention is None else tokens.fact("features")).float()

        def pick(rows: Tensor, k: int) -> Tensor:
            here = x[rows]
            weight, group = components(here, max(1, k // 4))
            score = weight if attention is None else attention[rows]
            return rows[self._shared(here, score, group, k)]

        return choose(self, tokens, pick)

    def _shared(self, x: Tensor, score: Tensor, group: Tensor, k: int) -> Tensor:
        """The k rows of x [n, D] that stay, by `score` and `group` [n]."""
        n, factor = len(x), 18 * k / len(x)
        unit = normalize(x, dim=-1)
        cosine = unit @ unit.T
        if self.rank == "attention":
            mean = cosine.triu(1).sum() / max(1, n * (n - 1) // 2)
        else:
            # The authors' mean has the zeros below the diagonal in it.
            mean, factor = cosine.triu().mean(), max(1, factor)
        order = score.argsort(descending=True, stable=True)
        close = (cosine > factor * mean)[order][:, order].cpu()
        members: dict[int, list[int]] = {}
        for place, g in enumerate(group[order].tolist()):
            members.setdefault(g, []).append(place)
        ranked = [free_first(of, close) for _, of in sorted(members.items())]
        counts = shares([len(of) for of, _ in ranked], [free for _, free in ranked], k)
        chosen = [place for (of, _), count in zip(ranked, counts, strict=True) for place in of[:count]]
        return order[uploaded(chosen, order.device)]

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Two Gram matrices and a symmetric decomposition (about 9 n^3) per image; its segments are taken together."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(4 * n * n * width + 9 * n**3 for n, k in zip(lengths, counts, strict=True) if k < n)


def components(x: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Of the rows x [n, D]: weight of each in its principal component of sigmoid(x), one of the first `most`; which."""
    z = x.sigmoid()
    z = z - z.mean(1, keepdim=True)
    vectors = torch.linalg.eigh(z @ z.T).eigenvectors.flip(1)[:, :most]
    return vectors.abs().max(1)


def free_first(of: Sequence[int], close: Tensor) -> tuple[list[int], int]:
    """The places `of` a group (best first) that no better one among them suppresses, then the suppressed ones; how many
    are not suppressed. close [n, n]: whether of two places the better one suppresses the other."""
    near: list[list[bool]] = close[list(of)][:, list(of)].tolist()
    free: list[int] = []
    rest: list[int] = []
    for place in range(len(of)):
        (rest if any(near[place][other] for other in free) else free).append(place)
    return [of[place] for place in free + rest], len(free)


def shares(sizes: Sequence[int], free: Sequence[int], k: int) -> list[int]:
    """Tokens of each group, k in all; `sizes` are the sizes of the groups, of which `free` are not suppressed."""
    most = [min(5 * math.ceil(k / 64), size, few) for size, few in zip(sizes, free, strict=True)]
    while sum(most) < k:
        most = [min(room + 1, size) for room, size in zip(most, sizes, strict=True)]
    # Each group has one; the others are differences of rounded cumulative shares.
    others, before, given = k - len(sizes), 0, []
    for i in range(len(free)):
        so_far = round(others * sum(free[: i + 1]) / sum(free))
        given.append(min(1 + so_far - before, most[i]))
        before = so_far
    for i in sorted(range(len(free)), key=lambda i: -free[i]):
        given[i] += min(most[i] - given[i], k - sum(given))
    return given
