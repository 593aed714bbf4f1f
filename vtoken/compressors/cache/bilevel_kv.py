"""Bi-level KV cache, after Video-XL-2, on stock models: chunks of a video far from the question are cached pooled."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors._chunks import Chunks, frames_of, packed, pooled
from vtoken.stages import Parts
from vtoken.stages.cache import CachedLayer, CacheStage, KeepSlots, Places
from vtoken.stages.query_attention import shared


class BilevelKV(CacheStage):
    """Every `frames` frames form a chunk, counted through all pictures and videos of the prompt. When the prefill ends,
    every layer keeps whole the first chunk, the last one and the `top` others to which the text after the pictures
    attends most: the mean over its last `window` tokens, over heads and over the tokens of a chunk. In all other
    chunks, every `pool` neighbouring tokens of a frame become one. Text stays.

    Values are averaged. Keys are averaged without RoPE, and the mean is rotated to the place of the middle token (of
    four the second), which is closest to their mean place: rotated keys of several places would partly cancel. Nothing
    is renumbered. A pooled token gets the attention of one token, not of `pool`.

    The prefill costs the same; `chunk_prefill` beside it is the other half of Video-XL-2.

    Paper: https://arxiv.org/abs/2506.19225
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.19225"
    deviations: ClassVar[str] = (
        "On stock models, which were not trained for it. Which chunks stay whole is this project's rule, by the "
        "layer's own attention; the authors read it from files made with another model. Theirs pools rotated keys "
        "(`rotated: true`) and then runs the question on what is left, from where the shorter prompt ends; here the "
        "question has been read densely and keeps its positions. Tokens are pooled within a frame, and a rest that "
        "is no full group is averaged; theirs drops it. Chunks are 16 frames (Qwen: pairs of frames) for their 4 units "
        "of 4."
    )
    rope: ClassVar[bool] = True
    places: ClassVar[bool] = True

    frames: int = Field(default=16, ge=1, description="frames of a chunk, pairs of frames on Qwen; a picture is one")
    top: int = Field(default=4, ge=0, description="chunks that stay whole beside the first and the last")
    pool: int = Field(default=4, ge=1, description="neighbouring tokens of a frame that become one")
    window: int = Field(default=64, ge=1, description="prompt tokens after the pictures whose attention decides")
    rotated: bool = Field(default=False, description="average keys as they are cached, as the authors' code does")

    def compress(self, layer: CachedLayer) -> KeepSlots:
        assert layer.places is not None
        places, (heads, n, _) = layer.places, layer.keys.shape
        chunks = places.once(("bilevel_kv", self.frames, self.pool), lambda: self._chunks(places))
        middle = max(0, len(chunks.tokens) - 2)
        if middle <= self.top or self.pool == 1:
            return KeepSlots(torch.arange(n, device=layer.keys.device).expand(heads, n), layer.lengths)
        scores = self._relevance(layer, chunks)[1:-1]
        best = scores.argsort(descending=True, stable=True)[: self.top] + 1
        whole = torch.zeros_like(chunks.tokens, dtype=torch.bool).index_fill(0, best, True)
        whole[0] = whole[-1] = True
        own = torch.arange(n, device=whole.device)
        alone = (chunks.chunk < 0) | whole[chunks.chunk]
        goes_to = torch.where(alone, own, chunks.goes_to)
        stay = goes_to == own
        counts = [int(c) for c in torch.stack([stay[slots].sum() for slots in layer.images]).tolist()]
        index = torch.argsort(~stay, stable=True)[: n - sum(layer.lengths) + sum(counts)]
        into = (stay.cumsum(0) - 1)[goes_to]
        weight = torch.where(alone, 1.0, chunks.weight)
        index, into, weight = (x.expand(heads, -1) for x in (index, into, weight))
        return KeepSlots(index, tuple(counts), into, weight, None if self.rotated else layer.rope)

    def query_window(self, prompt: int, lengths: Sequence[int], behind: int) -> int:
        return max(1, min(self.window, behind))

    def _relevance(self, layer: CachedLayer, chunks: Chunks) -> Tensor:
        """[chunks] attention to each chunk, mean over its tokens."""
        attention = shared(layer.query_attention, layer.queries, layer.keys, layer.scale)
        window = self.query_window(0, (), layer.behind)
        received = attention.received(window).mean((0, 1))
        received = received.masked_fill(chunks.chunk < 0, 0)
        return received.new_zeros(len(chunks.tokens)).index_add(0, chunks.chunk.clamp(min=0), received) / chunks.tokens

    def _chunks(self, places: Places) -> Chunks:
        frame = frames_of(places.image, places.raster_index, places.parts)
        return pooled(frame, self.frames, self.pool)

    def slots_of(self, prompt: int, lengths: Sequence[int], parts: Sequence[Parts]) -> int:
        return prompt - _spared(self, tuple(lengths), tuple(parts))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        """Assumes that all chunks hold equally many tokens, so that it does not matter which stay whole."""
        return whole

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int:
        return 2 * self.query_window(prompt, lengths, prompt - sum(lengths)) * prompt * heads * head_dim


@lru_cache(16)  # asked for every layer and step of an answer
def _spared(stage: BilevelKV, lengths: tuple[int, ...], parts: tuple[Parts, ...]) -> int:
    """Slots that pooling saves; where chunks differ in size, each counts as the mean chunk."""
    chunks = stage._chunks(Places(*packed(lengths, parts), parts))
    stay = torch.bincount(chunks.chunk[chunks.goes_to == torch.arange(sum(lengths))], minlength=len(chunks.tokens))
    spared = (chunks.tokens - stay)[1:-1]
    share = max(0, len(spared) - stage.top) / max(1, len(spared))
    return round(float(spared.sum()) * share)
