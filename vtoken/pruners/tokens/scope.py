"""SCOPE: keep tokens that cover the others and receive CLS attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels.farthest_tokens import padded
from vtoken.pruners._pools import choose_together
from vtoken.stages import Fact, Keep, Pruner, VisualTokens, offsets_of


class SCOPE(Pruner):
    """The coverage of a token is its cosine similarity (of encoder features, at least 0) to the most similar kept
    token. Repeatedly adds the token with the largest gain x attention^alpha, where gain is how much it raises the sum
    of the coverage of all tokens, and attention is that of CLS. Ties go to the lower index.

    Paper: https://arxiv.org/abs/2510.24214. A loop over kept tokens. Each gain is a sum over a column of all N x N
    similarities, which stay in memory (4 N^2 bytes per image, padded to the longest); the kernels for greedy
    choices read one row per choice and do not fit.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.24214"
    deviations: ClassVar[str] = (
        "Cosines and gains are float32; in the authors' code they have the model's half precision. "
        "Newline tokens follow the newline policy; on LLaVA-NeXT the authors drop them, and their share of each crop "
        "is rounded down."
    )

    alpha: float = Field(
        default=1.0, ge=0, description="exponent of the attention; 0 is coverage only, the authors always take 1"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("features"))

    def select(self, tokens: VisualTokens) -> Keep:
        saliency = tokens.fact("cls_attention").float() ** self.alpha
        features = tokens.fact("features")

        def pick(rows: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
            return covering(features[rows], saliency[rows], lengths, counts)

        return choose_together(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """All similarities, counted at the model's width, and all gains per kept token; the segments of an image are
        counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(n * n * (2 * width + 3 * k) for n, k in zip(lengths, counts, strict=True) if k < n)


def covering(x: Tensor, saliency: Tensor, lengths: Sequence[int], counts: Sequence[int]) -> Tensor:
    """[ΣK] rows of the packed x [ΣN, D], image by image in the order chosen, by gain in coverage times saliency [ΣN]; 1
    <= counts[i] <= lengths[i]. Runs all images at once, padded to the longest, and cuts off what an image chooses
    beyond its count. Does not wait for the device."""
    unit, saliency = padded(normalize(x.float(), dim=-1), lengths), padded(saliency, lengths)
    bounds = offsets_of(lengths, x.device)[:, None]
    starts = bounds[:-1]
    # Keeps tokens already taken, and padding, from being chosen.
    penalty = -(torch.arange(unit.shape[1], device=x.device) >= bounds[1:] - starts).float()
    cosine = torch.bmm(unit, unit.transpose(1, 2))
    covered, taken = torch.zeros_like(cosine[..., :1]), []
    for _ in range(max(counts)):
        gain = (cosine - covered).clamp_(min=0).sum(1)
        taken.append(best := torch.addcmul(penalty, gain, saliency).argmax(1, keepdim=True))
        penalty.scatter_(1, best, -1)
        covered = covered.maximum(cosine.gather(2, best[:, None].expand(-1, len(cosine[0]), 1)))
    index = torch.cat(taken, 1) + starts
    return torch.cat([row[:k] for row, k in zip(index, counts, strict=True)])
