"""AdaKV: SnapKV whose key heads share a budget: those that need more tokens keep more."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors.cache._slots import best, hold_text
from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.stages.cache import CachedLayer, HeadClasses, HeadSlots


class AdaKV(SnapKV):
    """Scores tokens as `snapkv` does, but takes the mean over the query heads of a key head before it pools over
    neighbouring tokens. The highest scores of a layer, over all its key heads, say how many tokens each head keeps; a
    head keeps at least the share `floor` of the mean. All heads together hold as much as with `snapkv`. Every head has
    a cache of its own, so that a decode step computes attention once per key head. How many tokens a head keeps is read
    on the host: one wait for the device per row and layer of a prefill.

    Paper: https://arxiv.org/abs/2407.11550
    """

    by_head: ClassVar[bool] = False
    in_classes: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2407.11550"
    deviations: ClassVar[str] = (
        "As snapkv, with a cache per key head as with the authors' gqa_support. Where heads do not divide the budget, "
        "largest remainders are rounded up, so that the sum is exact; the authors round each head. By default the key "
        "heads share the budget of each image. The floor is 0.2, as in their experiments with gqa_support; the "
        "function that patches a model has 0.5. `normalize` and `skip`, off in their code, are not offered."
    )

    kernel: int = Field(default=7, ge=1, description="tokens that scores are pooled over, an odd number")
    pooling: Literal["avg", "max"] = Field(default="max", description="avg counts positions beyond the ends as zero")
    floor: float = Field(default=0.2, ge=0, le=1, description="share of the mean that every key head keeps at least")

    def compress(self, layer: CachedLayer) -> HeadClasses:
        n, device = layer.keys.shape[1], layer.keys.device
        none, left = torch.zeros(1, 0, dtype=torch.int64, device=device), self.left(n, layer.lengths)
        stays = [torch.arange(n, device=device)[None]] * len(layer.keys)
        if window := self.query_window(n, layer.lengths, layer.behind):
            scores = self.score(layer, window)
            rivals = [scores[:, :-window]] if self.text else [scores[:, slots] for slots in layer.images]
            means = [left[0] - window] if self.text else left
            drawn = torch.stack([among_highest(each, k) for each, k in zip(rivals, means, strict=True)]).tolist()
            of_heads = zip(*map(self.shares, drawn, means), strict=True)
            stays = [
                best(mine[None], window + counts[0]) if self.text else hold_text(layer, mine[None], counts).index
                for mine, counts in zip(scores, of_heads, strict=True)
            ]
        heads = torch.arange(len(stays), device=device).split(1)
        return HeadClasses(tuple(HeadSlots(head, stay, none) for head, stay in zip(heads, stays, strict=True)))

    def pooled(self, received: Tensor) -> Tensor:
        return super().pooled(received.mean(1, keepdim=True))

    def shares(self, drawn: Sequence[int], mean: int) -> list[int]:
        """How many tokens every head keeps, `mean` on average, if `drawn` of each head are among the highest of all."""
        wanted = [(1 - self.floor) * count + self.floor * mean for count in drawn]
        counts = [int(each + 1e-6) for each in wanted]
        # Rounding is not to choose between remainders that are alike.
        order = sorted(range(len(drawn)), key=lambda h: (round(counts[h] - wanted[h], 6), h))
        for head in order[: len(drawn) * mean - sum(counts)]:
            counts[head] += 1
        return counts


def among_highest(scores: Tensor, mean: int) -> Tensor:
    """[Hk] how many tokens of every head are among the Hk * mean highest scores [Hk, M] of all heads."""
    heads, tokens = scores.shape
    highest = best(scores.reshape(1, -1), heads * mean) // tokens
    return (highest == torch.arange(heads, device=scores.device)[:, None]).sum(1)
