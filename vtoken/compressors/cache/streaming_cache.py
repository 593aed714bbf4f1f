"""Streaming cache: some or all key heads hold only the first and the latest tokens, also while an answer grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors._streaming_heads import StreamingHeads
from vtoken.stages import uploaded
from vtoken.stages.cache import CachedLayer, CacheStage, HeadClasses, HeadSlots
from vtoken.stages.layer_size import LayerSize


class StreamingCache(StreamingHeads, CacheStage):
    """At the end of the prefill, which is dense, a streaming head keeps the text, the first `sink` visual tokens, and
    of all others the latest `recent`; with every token that follows it drops the oldest of these, so that it grows no
    more. The other heads hold everything. Both kinds are stored apart. With `text: false` text is dropped like the
    rest: the first `sink` tokens of the prompt stay, and the latest `recent`.

    Without `gates`, all heads stream. With `gates`, one number per decoder layer and key head as DuoAttention learns
    them, the share `sparsity` of all key heads with the lowest numbers stream. Gates may be in a file: JSON, or the
    authors' full_attention_heads.tsv.

    `compensate` adds RazorAttention's compensation token: one more key and value stand for all tokens that a head has
    dropped, the means of theirs, with the logarithm of their number added to the logit. This is exact where they were
    all alike; keys carry RoPE, so those of distant places partly cancel out in the mean.

    A later turn with pictures reads what is left, and its own tokens densely; a turn of text reads as if its tokens
    came one by one.

    Paper: https://arxiv.org/abs/2410.10819; the compensation token: https://arxiv.org/abs/2407.15891
    """

    in_classes: ClassVar[bool] = True
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    deviations: ClassVar[str] = (
        "Text stays unless `text: false`: `sink` and `recent` count what is no text of a prompt with pictures. The "
        "prefill is dense in all heads; static_sparse thins it. Weights are not reordered: attention is computed once "
        "per kind of head. Among equal gates, those of the first layers stream; the authors draw at random. A row "
        "without images holds everything, what is generated included. RazorAttention's own window, a fifth of the "
        "prompt and 4000 tokens at least, is not offered. No gates are shipped: published ones are for text models."
    )

    sink: int = Field(default=64, ge=0, description="first visual tokens that stay; with text: false, first tokens")
    recent: int = Field(default=256, ge=1, description="latest other tokens that a query sees, itself among them")
    text: bool = Field(default=True, description="text of prompts stays in all heads; false: as in the authors' code")
    compensate: bool = Field(default=False, description="one key and value stand for all that a head has dropped")

    def compress(self, layer: CachedLayer) -> HeadClasses:
        heads, n, _ = layer.keys.shape
        streams = self.streams(layer.layer) or (True,) * heads
        order, stay = self._order(layer)
        slots = torch.arange(n, device=order.device)[None]
        parts = [(False, slots, slots[:, :0]), (True, order[None, :stay], order[None, max(stay, n - self.recent) :])]
        classes = []
        for streaming, slots, latest in parts:
            mine = [h for h, s in enumerate(streams) if s is streaming]
            if mine:
                window = self.recent if streaming else None
                index = uploaded(mine, order.device)
                classes.append(HeadSlots(index, slots, latest, window, streaming and self.compensate))
        return HeadClasses(tuple(classes))

    def _order(self, layer: CachedLayer) -> tuple[Tensor, int]:
        """The slots [N], those that stay for good first, and the number of those. In a later turn nothing is a sink."""
        n, sink = layer.keys.shape[1], self.sink if layer.classes is None else 0
        leaves = torch.zeros(n, dtype=torch.bool, device=layer.keys.device)
        if self.text:
            leaves[torch.cat(layer.images)[sink:]] = True
        else:
            leaves[sink:] = True
        return leaves.byte().argsort(stable=True), self._stay(n, layer.lengths, sink)

    def _stay(self, prompt: int, lengths: Sequence[int], sink: int) -> int:
        """Tokens of a prompt that a streaming head holds for good."""
        return prompt - sum(lengths) + min(sink, sum(lengths)) if self.text else min(sink, prompt)

    def slots_of_head(self, prompt: int, lengths: Sequence[int], generated: int = 0) -> int:
        """Tokens in a streaming head."""
        stay = self._stay(prompt, lengths, self.sink)
        return stay + min(self.recent, prompt - stay + generated)

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """The mean over all heads."""
        share = 1.0 if self.table is None else len(self._streaming) / sum(map(len, self.table))
        return round(share * self.slots_of_head(prompt, lengths) + (1 - share) * prompt)

    def cache_slots(self, at: LayerSize) -> float:
        thin = self._thin(at)
        stay = self.slots_of_head(at.prompt, at.images, at.generated)
        return (thin * stay + (at.kv_heads - thin) * (at.prompt + at.generated)) / at.kv_heads

    def cache_bytes(self, at: LayerSize) -> int:
        means = self.compensate * self._thin(at) * 2 * at.head_dim * 4  # in fp32
        return super().cache_bytes(at) + means

    def _thin(self, at: LayerSize) -> int:
        """Heads of the layer that stream."""
        return sum(self.streams(at.layer) or (True,) * at.kv_heads)
