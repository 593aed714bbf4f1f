"""Static sparse prefill: some or all heads read only the first and the latest tokens (A-shape, streaming heads)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors._streaming_heads import StreamingHeads
from vtoken.stages import uploaded
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything


class StaticSparse(StreamingHeads, SparseAttention):
    """A streaming head reads the first `sink` and the latest `window` tokens, in whole blocks; the last `last` queries
    of the prompt read everything (tri-shape). Without `gates`, all heads stream (A-shape). With `gates`, one number per
    decoder layer and key head as DuoAttention learns them, the share `sparsity` of all key heads with the lowest
    numbers stream, together with their query heads. Gates may be in a file: JSON, or the authors'
    full_attention_heads.tsv; copy the sink_size and recent_size of the config.json beside it into `sink` and `window`.

    Streaming throughout the prefill loses what is in between: A-shape finds 44 of 100 needles in video where full
    attention finds 98 (MMInference's V-NIAH). The cache stays whole and decoding reads all of it; DuoAttention keeps
    less for streaming heads.

    Paper: https://arxiv.org/abs/2410.10819
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    deviations: ClassVar[str] = (
        "Prefill only: the cache of streaming heads is not shortened. A query block reads every block that its window "
        "touches, up to one more than the window holds. Among equal gates, those of the first layers stream; the "
        "authors draw at random. Published gates are for text models; none is shipped."
    )

    sink: int = Field(default=128, ge=0, description="first tokens that are always read")
    window: int = Field(default=4096, ge=1, description="latest tokens that a query reads, itself included")
    last: int = Field(default=0, ge=0, description="queries at the end of the prompt that read everything")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, device = prompt.length, prompt.q.device
        whole = everything(prompt.heads, n, n, self.size, device)
        blocks, streams = self._blocks(n, device).expand_as(whole), self.streams(prompt.layer)
        if streams is not None:
            on = uploaded([s for s in streams for _ in range(prompt.heads // len(streams))], device, torch.bool)
            blocks = torch.where(on[:, None, None], blocks, whole)
        dense = (torch.arange(n, device=device) >= n - self.last).expand(prompt.heads, -1) if self.last else None
        return SparseMask(self.size, blocks, dense=dense)

    def _blocks(self, n: int, device: torch.device) -> Tensor:
        """[1, T, M] blocks that a streaming head reads."""
        t = torch.arange(-(-n // self.size), device=device)
        oldest = (t[:, None] * self.size - self.window + 1).div(self.size, rounding_mode="floor")
        blocks = (t >= oldest) | (t * self.size < self.sink)
        return (blocks & causal(blocks))[None]

    def density(self, length: int, layer: int) -> float | None:
        cpu = torch.device("cpu")
        blocks, streams = self._blocks(length, cpu), self.streams(layer)
        dense = (torch.arange(length) >= length - self.last)[None] if self.last else None
        thin = float(SparseMask(self.size, blocks, dense=dense).density())
        if streams is None:
            return thin
        whole = float(SparseMask(self.size, everything(1, length, length, self.size, cpu), dense=dense).density())
        return (thin * sum(streams) + whole * (len(streams) - sum(streams))) / len(streams)
