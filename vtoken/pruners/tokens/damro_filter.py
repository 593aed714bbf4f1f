"""DAMRO's outliers: drop the few patches that draw most of the CLS attention, before another stage chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.stages import (
    Fact,
    Keep,
    Parts,
    Site,
    Stage,
    VisualTokens,
    image_of,
    keep_all,
    keep_where,
    offsets_of,
    segments_of,
)
from vtoken.stages.budget import PER_SEGMENT


class DamroFilter(Stage):
    """Drops the `outliers` tokens with the highest CLS attention in the feature layer, but never all tokens. With
    `high_norm`, drops only those of them whose encoder output has a norm above Q3 + 1.5 (Q3 - Q1) of the image's norms;
    how many that are depends on the picture, so the plan counts none. Use it as a filter before a pruner, as in
    [damro_filter: {}, divprune: {keep: 64}].

    FasterVLM, VisionZip and HiRED keep the very tokens that this stage drops: choose one or the other. Towers without
    CLS rank by received attention; use `high_norm` there.

    Paper: https://arxiv.org/abs/2410.04514, which does not drop these tokens but uses them in contrastive decoding. The
    use as a filter is experimental.
    """

    site: ClassVar[Site] = "tokens"
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.04514"
    deviations: ClassVar[str] = (
        "Ranks by attention averaged over heads; the authors take one softmax over the channels of all heads at once. "
        "Drops the outliers; the authors contrast the answer with one that sees only them."
    )

    outliers: int = Field(default=10, ge=1, description="tokens to drop; 10 in LLaVA, 4 in InstructBLIP")
    each_segment: bool = Field(
        default=False,
        description="drop that many in every crop of an anyres image (as the authors do) and every frame of a video",
    )
    high_norm: bool = Field(default=False, description="drop only those whose norm is an outlier too")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), *([Fact("features")] if self.high_norm else []))

    def select(self, tokens: VisualTokens) -> Keep:
        score, device = tokens.fact("cls_attention"), tokens.x.device
        order, sizes = torch.arange(len(score), device=device), tokens.lengths
        if self.each_segment and tokens.segment is not None:
            most = int(tokens.segment.max()) + 1
            owner = image_of(tokens.lengths, device) * most + tokens.segment
            order = owner.argsort(stable=True)
            sizes = tuple(torch.bincount(owner, minlength=most * len(tokens.lengths)).tolist())
        few = [min(self.outliers, n - 1) if n else 0 for n in sizes]
        drop = torch.zeros(len(score), dtype=torch.bool, device=device)
        drop[order[topk_tokens(score[order], offsets_of(sizes, device), few)]] = True
        if self.high_norm:
            drop &= self._long(tokens)
        if not any(few):
            return keep_all(tokens)
        return keep_where(tokens, ~drop)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        if self.high_norm:
            return tuple(lengths)
        each = [1] * len(lengths)
        if self.each_segment:
            each = [max(segments_of(p, per) for per in PER_SEGMENT) for p in parts]
        return tuple(n - max(0, min(self.outliers * s, n - s)) for n, s in zip(lengths, each, strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return not self.high_norm and (whole or not self.each_segment)

    def _long(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] whether the norm of a token's encoder output is an outlier within its image."""
        out = []
        for norm in tokens.fact("features").float().norm(dim=-1).split(tokens.lengths):
            q1, q3 = norm.quantile(norm.new_tensor([0.25, 0.75])) if len(norm) else (norm.sum(), norm.sum())
            out.append(norm > q3 + 1.5 * (q3 - q1))
        return torch.cat(out)
