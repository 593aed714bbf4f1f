"""SCOPE: keep the tokens that cover the others and that CLS attends to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose
from vtoken.stages import Fact, Keep, Pruner, VisualTokens


class SCOPE(Pruner):
    """A token is covered as well as it resembles the nearest kept one (cosine of encoder features, none below 0). Each
    time the token comes next for which gain x attention^alpha is largest: its gain is what all tokens together would be
    covered better with it, its attention that of CLS. Ties go to the lower index.

    Paper: https://arxiv.org/abs/2510.24214. A loop over images and kept tokens: each gain is a sum over all N x N
    cosines, which are kept (4 N^2 bytes); the kernels for greedy choices read one row of them per choice and do not
    fit.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    deviations: ClassVar[str] = (
        "Cosines and gains are float32, in the authors' code half precision as the model. "
        "Newline tokens follow the newline policy; on LLaVA-NeXT the authors drop them, and their share of each crop "
        "is rounded down."
    )

    alpha: float = Field(
        default=1.0, ge=0, description="exponent of the attention; 0 is coverage alone, the authors take 1 throughout"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("features"))

    def select(self, tokens: VisualTokens) -> Keep:
        saliency = tokens.fact("cls_attention").float() ** self.alpha
        features = tokens.fact("features")

        def pick(rows: Tensor, k: int) -> Tensor:
            return rows[covering(features[rows], saliency[rows], k)]

        return choose(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """All similarities, at the model's width, and per kept token all gains; segments of an image are taken
        together."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(n * n * (2 * width + 3 * k) for n, k in zip(lengths, counts, strict=True) if k < n)


def covering(x: Tensor, saliency: Tensor, k: int) -> Tensor:
    """[k] rows of x [n, D], in the order taken, by gain in coverage times saliency [n]; 1 <= k <= n. Nothing is fetched
    from the device."""
    unit = normalize(x.float(), dim=-1)
    cosine, covered = unit @ unit.T, unit.new_zeros(len(unit), 1)
    taken = torch.zeros(len(unit), dtype=torch.bool, device=x.device)
    order = []
    for _ in range(k):
        gain = (cosine - covered).clamp_(min=0).sum(0) * saliency
        order.append(gain.masked_fill_(taken, -1).argmax(keepdim=True))
        taken.index_fill_(0, order[-1], True)
        covered = covered.maximum(cosine.index_select(1, order[-1]))
    return torch.cat(order)
