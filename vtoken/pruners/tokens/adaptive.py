"""Adaptive: attention where a picture is plain, diversity where it is complex."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import farthest_tokens, topk_tokens
from vtoken.pruners._pools import choose_together, offsets_on_host
from vtoken.stages import Fact, Keep, Pruner, VisualTokens, image_of, uploaded


class Adaptive(Pruner):
    """Of every picture (crop, frame) the entropy of its CLS attention, scaled to sum 1, is divided by that of equal
    attention (log n). At or below `entropy` the picture is plain, what matters draws the attention, and the tokens with
    the highest attention stay, as in fastervlm. Above it the picture is complex, and the tokens that lie farthest apart
    stay, as in divprune. Both are computed for every picture, so that the host need not wait for the device.

    No paper: a combination of ours, after the finding that attention is stronger on plain pictures and diversity on
    complex ones. The threshold is a guess; entropies of other towers lie elsewhere. On the reference model tiny-llava
    (entropies of 0.40 to 0.70) it does not pay: attention alone is better at every budget.
    """

    paper: ClassVar[str] = "no paper"

    entropy: float = Field(
        default=0.9, ge=0, le=1, description="entropy of the attention, of log n, up to which a picture is plain"
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        attention = tokens.fact("cls_attention").float()

        def pick(rows: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
            plain = relative_entropy(attention[rows], lengths) <= self.entropy
            by_attention = topk_tokens(attention[rows], offsets_on_host(lengths).to(rows.device), counts)
            apart = farthest_tokens(tokens.x[rows], lengths, counts)
            return torch.where(plain[image_of(counts, rows.device)], by_attention, apart)

        return choose_together(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Those of divprune; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (n + k) * width for n, k in zip(lengths, counts, strict=True) if k < n)


def relative_entropy(weights: Tensor, lengths: Sequence[int]) -> Tensor:
    """[pools] entropy of the weights [ΣN] of each pool, as shares of their sum, divided by log n."""
    pool = image_of(lengths, weights.device)
    sums = weights.new_zeros(len(lengths)).index_add_(0, pool, weights)
    share = weights / sums[pool]
    each = weights.new_zeros(len(lengths)).index_add_(0, pool, -torch.special.xlogy(share, share))
    return each / uploaded(lengths, weights.device).clamp(min=2).log()
