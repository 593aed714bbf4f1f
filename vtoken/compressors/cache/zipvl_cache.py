"""ZipVL, KV cache: every layer drops its unimportant tokens (v2), or keeps all tokens quantised to a few bits (v1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import ceil
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vtoken.compressors._zipvl import Important, quantised
from vtoken.compressors.cache._slots import ascending
from vtoken.kernels import query_attention
from vtoken.stages import LayerSize, offsets_of
from vtoken.stages.cache import CachedLayer, CacheStage, GeneratedBlock, KeepSlots
from vtoken.stages.quantized import QuantizedKV
from vtoken.stages.query_attention import shared


class ZipVLCache(Important, CacheStage):
    """At the end of the prefill, every layer finds its important tokens as `zipvl` does: as few as hold `tau` of the
    sampled queries' attention, the same for all heads; their number depends on layer and prompt.

    `mode: drop` (second version of the paper) caches only these. `mode: quantise` (first version) keeps all tokens, the
    important ones in `bits[0]` and the others in `bits[1]` bits: keys per channel, values per token after equalising
    their channels. Tokens after the prompt are quantized in blocks of `every`; a token of a block is important if
    it is among the fewest cached tokens with `tau` of the newest query's attention.

    This saves memory, not time: every decode step dequantizes the keys and values of every layer at full width, one
    layer after the other, in a few copies of that layer. `cache_bytes` of the trace is the size of the quantized cache.

    Paper: https://arxiv.org/abs/2410.08584
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.08584"
    deviations: ClassVar[str] = (
        "As in zipvl for the choice of tokens: the authors' code was not available, and text always counts as "
        "important, except generated text, where only the query's attention decides. The quantiser is that of the same "
        "authors' ZipCache. Tokens of a later text turn count as generated; a later turn with images leaves the tokens "
        "in between at full precision, as are tokens packed together with padding. With drafts, a hundred tokens are "
        "rounded one forward later. A row without images is left unchanged."
    )

    mode: Literal["drop", "quantise"] = Field(
        default="drop",
        description="drop unimportant tokens, or keep all in a few bits (saves memory, not time)",
    )
    bits: tuple[int, int] = Field(
        default=(4, 2), description="mode quantise: bits of important and of other tokens, 1 to 8"
    )
    every: int | None = Field(
        default=100,
        ge=1,
        description="mode quantise: tokens after the prompt are quantised together whenever there are this many, text "
        "or not; null: never",
    )
    left: float = Field(
        default=1.0, gt=0, le=1, description="share of the prompt expected to be important: for the FLOPs account only"
    )

    @field_validator("bits")
    @classmethod
    def _few(cls, bits: tuple[int, int]) -> tuple[int, int]:
        if not all(1 <= b <= 8 for b in bits):
            raise ValueError("each must be 1 to 8")
        return bits

    def compress(self, layer: CachedLayer) -> KeepSlots | QuantizedKV:
        n, device = layer.keys.shape[1], layer.keys.device
        text = torch.ones(n, dtype=torch.bool, device=device)
        text[torch.cat(layer.images)] = False
        attention = shared(layer.query_attention, layer.queries, layer.keys, layer.scale)
        index = self.important(attention, text)
        alive = torch.zeros_like(text).index_fill(0, index, True)
        if self.mode == "drop":
            return KeepSlots(index.expand(len(layer.keys), -1), self._counts(layer, alive))
        (rest,) = ascending(~alive[None], n - len(index))
        return quantised(layer.keys, layer.values, ((index, self.bits[0]), (rest, self.bits[1])))

    def requantize_every(self) -> int | None:
        return self.every if self.mode == "quantise" else None

    def requantize(self, layer: GeneratedBlock) -> QuantizedKV:
        """Only the newest query counts. It sees every token, so the attention a token receives needs no correction."""
        n, device = layer.keys.shape[1], layer.keys.device
        one, all_of = offsets_of((1,), device), offsets_of((n,), device)
        received = query_attention(layer.query[None], layer.keys.transpose(0, 1), one, all_of, layer.scale).double()
        order = received.argsort(descending=True, stable=True)
        count = (received[order].cumsum(0) < self.tau).sum() + 1
        alive = (order.argsort() < count)[None, layer.at.start : layer.at.stop]
        many, bits = int(alive.sum()), self.bits
        groups = (ascending(alive, many)[0], bits[0]), (ascending(~alive, len(layer.at) - many)[0], bits[1])
        return quantised(layer.keys[:, layer.at.start : layer.at.stop], layer.values, groups)

    def _counts(self, layer: CachedLayer, alive: Tensor) -> tuple[int, ...] | None:
        """Visual tokens that stay of each image; None if text may be dropped too."""
        if self.text:
            return None
        return tuple(torch.stack([alive[slots].sum() for slots in layer.images]).tolist())

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        """How many tokens are important, and so stay or take more bits, depends on the picture."""
        return False

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """With `mode: drop` an estimate, the share `left`, as the number depends on the prompt; the default of `left`
        counts all."""
        return prompt if self.mode == "quantise" else self._expected(prompt, lengths)

    def _expected(self, prompt: int, lengths: Sequence[int]) -> int:
        """Expected number of important tokens."""
        least = 1 if self.text else prompt - sum(lengths)
        return min(prompt, max(least, ceil(self.left * prompt)))

    def packed_bytes(
        self, prompt: int, lengths: Sequence[int], kv_heads: int, head_dim: int, dtype_bytes: int
    ) -> int | None:
        if self.mode == "drop":
            return None
        return self._packed(prompt, self._expected(prompt, lengths), kv_heads, head_dim, dtype_bytes)

    def _packed(self, tokens: int, important: int, kv_heads: int, head_dim: int, dtype_bytes: int) -> int:
        """Bytes of tokens that are quantized together."""
        total = 4 * tokens + dtype_bytes * kv_heads * head_dim  # place of each token, and the factor of each channel
        for n, bits in zip((important, tokens - important), self.bits, strict=True):
            minima = (
                2 * dtype_bytes * kv_heads * head_dim + 2 * 4 * n
            )  # and maxima: of keys per channel, of values per token
            total += 2 * n * kv_heads * -(-head_dim * bits // 8) + (minima if n else 0)
        return total

    def cache_bytes(self, at: LayerSize) -> int:
        """The share `left` of every block of generated tokens counts as important."""
        if self.mode == "drop" or self.every is None or at.generated < self.every:
            return super().cache_bytes(at)
        blocks, behind = divmod(at.generated, self.every)
        important = min(self.every, max(1, ceil(self.left * self.every)))
        block = self._packed(self.every, important, at.kv_heads, at.head_dim, at.number_bytes)
        return super().cache_bytes(replace(at, generated=behind)) + blocks * block

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> int:
        return 2 * min(self.recent + self.drawn, prompt) * prompt * heads * head_dim
