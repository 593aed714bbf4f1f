"""VFlowOpt: drop the tokens that receive least attention, and recycle them as one weighted mean per spatial cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.pruners.tokens._vflowopt import cells_of, recycle
from vtoken.stages import Fact, Keep, Pruner, VisualTokens, image_of, keep_all, size_of, uploaded

Rgb = Annotated[tuple[float, float, float], Field(strict=False)]


class VFlowOpt(Pruner):
    """The importance of a token is the attention it receives in the layer whose output the model uses as features,
    averaged over the queries that themselves receive more than `threshold` times the mean of their crop (frame), plus
    `alpha` times the softmax over its crop of its patch entropy (in bits, of the 256-bin grey histogram). The least
    important tokens of an image form a pool. In every cell of `cell` x `cell` tokens (any real number, each raster and
    each frame by itself), the pool's members become one token: their mean weighted by importance, at the place of the
    most important. The pool is as large as needed to leave `keep` tokens; if a pool of all tokens leaves more, only the
    most important of these stay. With `exact: false` it holds round(N (1 - R)) + int(N / cell²) tokens, as in the
    authors' code: the count is then close to the budget, and `expected_counts` returns the budget.

    The entropy is off in all released settings (alpha: 0). Otherwise it is taken over all pixels of a token, mapped to
    0..255 with `mean` and `std` (the defaults are those of LLaVA-OneVision's SigLIP and of Qwen3-VL; CLIP and Qwen2
    have their own); `merge` is 4 for Qwen. Where OneVision scales its crops down, the pixels are scaled too. Loops over
    images; waits for the device only with `exact: false`.

    This is the first of the method's three stages; the cuts inside the decoder are `vflowopt_late`.
    Paper: https://arxiv.org/abs/2508.05211
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2508.05211"
    deviations: ClassVar[str] = (
        "If no query is above the threshold, the one that receives most counts; the authors' code gives NaN there. "
        "The count is exact. Single-raster images are recycled too; the authors' code drops without recycling (cell: "
        "null). Newlines do not count towards the share (newline: keep keeps them all, as the authors do)."
    )

    threshold: float = Field(
        default=34.76,
        ge=0,
        description="received attention, in means of the crop, above which a query counts; 0: all count",
    )
    cell: float | None = Field(
        default=15.581, ge=1, description="side of a recycling cell, in tokens; null: drop without recycling"
    )
    alpha: float = Field(default=0.0, description="weight of the patch entropy")
    exact: bool = Field(default=True, description="leave exactly `keep` tokens; false: the authors' pool size")
    mean: Rgb = Field(default=(0.5, 0.5, 0.5), description="of the pixels' normalisation, per colour")
    std: Rgb = Field(default=(0.5, 0.5, 0.5), description="of the pixels' normalisation, per colour")
    merge: int = Field(default=1, ge=1, description="patches that become one token")

    @model_validator(mode="after")
    def _one_pool(self) -> VFlowOpt:
        if self.keep.per is not None:
            raise ValueError(f"vflowopt has one pool per image, so {self.keep.per} does not fit; write keep: 64 or 25%")
        return self

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("received_attention", above=self.threshold), *((Fact("pixels"),) if self.alpha else ()))

    def tower_incompatibility(self, width: int, unit: int) -> str:
        if self.merge == unit or (self.merge == 1 and not self.alpha):
            return ""
        return f"merge: {self.merge} patches are not what this model makes into one token; write merge: {unit}"

    def score(self, tokens: VisualTokens) -> Tensor:
        received: Tensor = tokens.fact("received_attention", above=self.threshold).float()
        if not self.alpha:
            return received
        crop, most = image_of(tokens.lengths, received.device), max(map(size_of, tokens.parts))
        crop = crop * most + (0 if tokens.segment is None else tokens.segment)
        weight = self.entropy(tokens.fact("pixels")).double().exp()
        total = weight.new_zeros(len(tokens.parts) * most).index_add_(0, crop, weight)
        return received + self.alpha * (weight / total[crop]).float()

    def entropy(self, pixels: Tensor) -> Tensor:
        """[ΣN] entropy in bits of the grey histogram of each token's pixels [ΣN, P]."""
        colours = pixels.float().unflatten(1, (self.merge, 3, -1))
        mean, std = (uploaded(v, pixels.device, torch.float32)[:, None] for v in (self.mean, self.std))
        grey = ((colours * std + mean).mean(2) * 255).round().clamp(0, 255).long().flatten(1)
        count = torch.zeros(len(grey), 256, device=grey.device).scatter_add_(1, grey, torch.ones_like(grey).float())
        return torch.special.entr(count / grey.shape[1]).sum(1) / math.log(2)

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        importance = self.score(tokens)
        if self.cell is None:
            return Keep(topk_tokens(importance, tokens.offsets, list(counts)), counts)
        index, into, start = [], [], 0
        lengths: list[int] = []
        for n, k, parts in zip(tokens.lengths, counts, tokens.parts, strict=True):
            here = slice(start, start + n)
            drop = n - k if self.keep.share is None else round(n * (1 - self.keep.share))
            pool = None if self.exact or k == n else drop + int(n / self.cell**2)
            cell, cells = cells_of(tokens.raster_index[here], parts, self.cell)
            alive, target = recycle(importance[here], cell, cells, k, pool)
            left = k if pool is None else int(alive.sum())
            index.append((~alive).byte().argsort(stable=True)[:left] + start)
            into.append(torch.where(alive[target], alive.cumsum(0)[target] - 1 + sum(lengths), -1))
            lengths.append(left)
            start += n
        # A recycled token is a mean even where a negative alpha made importance negative.
        return Keep(torch.cat(index), tuple(lengths), torch.cat(into), importance.clamp(min=1e-12))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return self.exact or self.cell is None

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width if self.cell else 0
