"""ToDRE, stage 1: keep tokens that are dissimilar, starting from the one the vision encoder attends to most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import farthest_tokens, topk_tokens
from vtoken.pruners._pools import choose_together, offsets_on_host
from vtoken.stages import Fact, Keep, Pruner, VisualTokens, image_of, uploaded


class ToDRE(Pruner):
    """Starts from the pivot, the token with the highest CLS attention in encoder layer `layer` (in an anyres image:
    among the downscaled whole), then adds one token at a time. `max_sum` adds the one with the lowest sum of cosine
    similarities to those already chosen; `k_center` the one whose highest similarity to them is lowest. Similarities
    are between visual tokens as they enter the LLM. All crops or frames of an image form one pool; with per_crop or
    per_frame, each is a pool with its own pivot.

    Stage 2 of the paper (all visual tokens are dropped at a decoder layer) is the stage `todre_exit`. Without CLS, the
    pivot is the token that receives the most attention; the authors found that a random one does as well.

    Paper: https://arxiv.org/abs/2505.18757 (v2: max_sum; v1: k_center). No code was published; the steps of k_center
    are farthest-first, as its name says.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2505.18757"
    deviations: ClassVar[str] = (
        "No code to compare with. Heads of the pivot's attention are averaged, kept tokens stay in reading order."
    )

    strategy: Literal["max_sum", "k_center"] = Field(
        default="max_sum",
        description="max_sum: lowest sum of similarities to those chosen (v2); k_center: lowest maximum (v1)",
    )
    layer: int | None = Field(
        default=-1,
        description="encoder layer whose CLS attention gives the pivot; null: the one the features come from",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention", self.layer),)

    def select(self, tokens: VisualTokens) -> Keep:
        """Each choice needs the one before: on a CPU a loop over kept tokens, on a GPU one launch."""
        pivot = tokens.fact("cls_attention", self.layer)
        if self.keep.per != "per_crop":
            pivot = pivot.masked_fill(in_a_crop(tokens), -torch.inf)

        def pick(rows: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
            first = topk_tokens(pivot[rows], offsets_on_host(lengths), [1] * len(lengths))
            rule: Literal["max_sum", "max_min"] = "max_sum" if self.strategy == "max_sum" else "max_min"
            return farthest_tokens(tokens.x[rows], lengths, counts, first, rule)

        return choose_together(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """One row of similarities per kept token; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * k * width for n, k in zip(lengths, counts, strict=True) if k < n)


def in_a_crop(tokens: VisualTokens) -> Tensor:
    """[ΣN] whether a token belongs to a crop of an anyres image; the downscaled whole does not count as a crop."""
    several = uploaded([len(parts) == 2 for parts in tokens.parts], tokens.x.device, torch.bool)
    inside = several[image_of(tokens.lengths, tokens.x.device)]
    return inside & (tokens.segment > 0) if tokens.segment is not None else torch.zeros_like(inside)
