"""SnapKV: the KV cache keeps what the last prompt tokens attend to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from vtoken.compressors.cache._slots import best, hold_text
from vtoken.stages.budget import Budget
from vtoken.stages.cache import CachedLayer, CacheStage, Decision, KeepSlots
from vtoken.stages.query_attention import shared


class SnapKV(CacheStage):
    """At the end of the prefill, every layer and KV head keeps the tokens that the last `window` prompt tokens attend
    to most: softmax over everything they see, mean over the window, pooled over `kernel` neighbouring tokens, mean over
    the query heads of the KV head. The prefill costs the same; the cache is smaller, and decoding reads less.

    By default text stays and the visual tokens of each image compete; the window is at most the text after the last
    image. With `text: true`, the whole prompt competes for `keep` slots, and the window's own tokens take theirs first.

    Paper: https://arxiv.org/abs/2404.14469
    """

    by_head: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2404.14469"
    deviations: ClassVar[str] = (
        "Text is kept unless `text: true`; the authors' budget (2048 in their code) covers the whole prompt. One cache "
        "per KV head, its query heads averaged: the authors' code repeats K and V and caches every query head. Kept "
        "tokens stay in order. A row without images is left unchanged. The kernel is 5, as in the code."
    )

    keep: Budget = Field(
        description="visual tokens each KV head keeps of each image; with text: true, of the whole prompt"
    )
    window: int = Field(default=32, ge=1, description="prompt tokens whose attention decides")
    kernel: int = Field(default=5, ge=1, description="tokens that scores are pooled over, an odd number")
    pooling: Literal["avg", "max"] = Field(default="avg", description="avg counts positions beyond the ends as zero")
    text: bool = Field(default=False, description="text may be evicted too, as in the authors' code")

    @field_validator("kernel")
    @classmethod
    def _odd(cls, kernel: int) -> int:
        if kernel % 2 == 0:
            raise ValueError("must be odd, so that a score stays with its token")
        return kernel

    def compress(self, layer: CachedLayer) -> Decision:
        n, heads = layer.keys.shape[1], len(layer.keys)
        left = self.left(n, layer.lengths, layer.place)
        stay = left[0] if self.text else n - sum(layer.lengths) + sum(left)
        if stay == n:
            return KeepSlots(torch.arange(n, device=layer.keys.device).expand(heads, n), layer.lengths)
        window = self.query_window(n, layer.lengths, layer.behind)
        if self.text:
            return KeepSlots(best(self.score(layer, window), stay))
        return hold_text(layer, self.score(layer, window), left)

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        slots = self.slots(prompt, lengths)
        if slots == prompt:
            return 0
        return min(self.window, slots) if self.text else max(1, min(self.window, behind))

    def score(self, layer: CachedLayer, window: int) -> Tensor:
        """[Hk, N] scores; the window's own tokens score highest."""
        attention = shared(layer.query_attention, layer.queries, layer.keys, layer.scale)
        before = self.pooled(attention.received(window)[..., :-window] / window)
        return F.pad(before, (0, window), value=torch.inf)

    def pooled(self, received: Tensor) -> Tensor:
        """[Hk, M] scores from the attention [Hk, G, M] that tokens received from each key head's G query heads."""
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        return pool(received, self.kernel, 1, self.kernel // 2).mean(1)

    def left(self, prompt: int, lengths: Sequence[int], place: tuple[int, int] | None = None) -> tuple[int, ...]:
        """How many tokens every KV head keeps of each image; with text: true, of the prompt. `place`: as in
        CachedLayer; None: the mean over layers."""
        whole = (prompt,) if self.text else lengths
        return self.keep.counts(whole, (0,) * len(whole))

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        return sum(self.left(prompt, lengths)) + (0 if self.text else prompt - sum(lengths))

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int:
        return 2 * min(self.window, prompt) * prompt * heads * head_dim
