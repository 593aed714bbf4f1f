"""Static sparse prefill: some or all heads read only the first and the latest tokens (A-shape, streaming heads)."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from vtoken.compressors._streaming_heads import StreamingHeads
from vtoken.compressors.attention import _moa
from vtoken.stages import NAMES_FILE, uploaded
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything


class StaticSparse(StreamingHeads, SparseAttention):
    """A streaming head reads the first `sink` and the latest `window` tokens, in whole blocks; the last `last` queries
    of the prompt read everything (tri-shape). Without `gates`, all heads stream (A-shape). With `gates`, one number per
    decoder layer and key head as DuoAttention learns them, the share `sparsity` of all key heads with the lowest
    numbers stream, together with their query heads. Gates may be in a file: JSON, or the authors'
    full_attention_heads.tsv; copy the sink_size and recent_size of the config.json beside it into `sink` and `window`.

    With `plan`, every head has a window of its own, alpha + beta * N tokens of a prompt of N, in whole blocks of 64: a
    file {layer: {head: [alpha, beta]}}, or {"alphas": [[...]], "betas": [[...]]} as the authors of MoA
    (https://arxiv.org/abs/2406.14909) write it; heads are all query heads, or the key heads.

    Streaming throughout the prefill loses what is in between: A-shape finds 44 of 100 needles in video where full
    attention finds 98 (MMInference's V-NIAH). The cache stays whole and decoding reads all of it; `streaming_cache`
    keeps less for streaming heads, as DuoAttention does.

    Paper: https://arxiv.org/abs/2410.10819
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10819"
    deviations: ClassVar[str] = (
        "Prefill only: the cache of streaming heads is not shortened (streaming_cache does that). A query block reads "
        "every block that its window "
        "touches, up to one more than the window holds. Among equal gates, those of the first layers stream; the "
        "authors draw at random. Published gates and plans are for text models; none is shipped. A plan thins the "
        "prefill alone, where MoA's thins the cache, too; a window has one block at least."
    )

    sink: int = Field(default=128, ge=0, description="first tokens that are always read")
    window: int = Field(default=4096, ge=1, description="latest tokens that a query reads, itself included")
    last: int = Field(default=0, ge=0, description="queries at the end of the prompt that read everything")
    plan: str | None = Field(
        default=None,
        description="a file of windows per decoder layer and head, in place of `window` and `gates`",
        json_schema_extra=NAMES_FILE,
    )
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    @field_validator("plan")
    @classmethod
    def _written(cls, plan: str | None) -> str | None:
        if plan is not None:
            _moa.read(plan)
        return plan

    @model_validator(mode="after")
    def _one_table(self) -> Self:
        if self.plan is not None and self.gates is not None:
            raise ValueError("gates and plan both say what heads read; give one of them")
        return self

    @cached_property
    def planned(self) -> _moa.Plan | None:
        """The plan, read once as the gates are."""
        return None if self.plan is None else _moa.read(self.plan)

    def incompatibility(self, depth: int, width: int) -> str:
        if self.planned is None or len(self.planned) == depth:
            return super().incompatibility(depth, width)
        return f"the plan {self.plan!r} is for {len(self.planned)} decoder layers, this model has {depth}"

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        if self.planned is None or len(self.planned[0]) in (heads, key_heads):
            return super().heads_incompatibility(heads, key_heads, width)
        return (
            f"the plan {self.plan!r} is for {len(self.planned[0])} heads in a layer, this model has {heads} query "
            f"heads and {key_heads} key heads"
        )

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, device = prompt.length, prompt.q.device
        whole = everything(prompt.heads, n, n, self.size, device)
        blocks, streams = self._blocks(n, prompt.layer, device), self.streams(prompt.layer)
        blocks = blocks[:, None].expand(-1, prompt.heads // len(blocks), -1, -1).flatten(0, 1)
        if streams is not None:
            on = uploaded([s for s in streams for _ in range(prompt.heads // len(streams))], device, torch.bool)
            blocks = torch.where(on[:, None, None], blocks, whole)
        dense = (torch.arange(n, device=device) >= n - self.last).expand(prompt.heads, -1) if self.last else None
        return SparseMask(self.size, blocks, dense=dense)

    def _blocks(self, n: int, layer: int, device: torch.device) -> Tensor:
        """[1, T, M] blocks that a streaming head reads; with a plan [its heads, T, M]."""
        t = torch.arange(-(-n // self.size), device=device)
        window: int | Tensor = self.window
        if self.planned is not None:
            window = uploaded(_moa.windows(self.planned, layer, n), device)[:, None, None]
        oldest = (t[:, None] * self.size - window + 1).div(self.size, rounding_mode="floor")
        blocks = (t >= oldest) | (t * self.size < self.sink)
        return (blocks & causal(blocks)).view(-1, len(t), len(t))

    def density(self, length: int, layer: int) -> float | None:
        cpu = torch.device("cpu")
        blocks, streams = self._blocks(length, layer, cpu), self.streams(layer)
        dense = (torch.arange(length) >= length - self.last)[None] if self.last else None
        every = None if dense is None else dense.expand(len(blocks), -1)
        thin = float(SparseMask(self.size, blocks, dense=every).density())
        if streams is None:
            return thin
        whole = float(SparseMask(self.size, everything(1, length, length, self.size, cpu), dense=dense).density())
        return (thin * sum(streams) + whole * (len(streams) - sum(streams))) / len(streams)
