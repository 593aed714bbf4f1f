"""Static sparse prefill: some or all heads read only the first and the latest tokens (A-shape, streaming heads)."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vtoken.compressors.attention import _duo
from vtoken.stages import NAMES_FILE, uploaded
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything


class StaticSparse(SparseAttention):
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
    gates: _duo.Gates | str | None = Field(
        default=None,
        description="per decoder layer, one number per key head: low ones stream; or a file of them, .json or .tsv",
        json_schema_extra=NAMES_FILE,
    )
    sparsity: float = Field(default=0.5, ge=0, le=1, description="share of key heads that stream, given gates")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    @field_validator("gates")
    @classmethod
    def _readable(cls, gates: _duo.Gates | str | None) -> _duo.Gates | str | None:
        if isinstance(gates, str):
            _duo.read(gates)
        elif gates is not None:
            _duo.check(gates, "gates")
        return gates

    @cached_property
    def table(self) -> _duo.Gates | None:
        """The gates, from the options or the file, read once: later changes to the file do not reach a wrapped
        model."""
        return _duo.read(self.gates) if isinstance(self.gates, str) else self.gates

    def incompatibility(self, depth: int, width: int) -> str:
        gates = self.table
        if gates is None or len(gates) == depth:
            return ""
        return self._other(f"{len(gates)} decoder layers", depth)

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        gates = self.table
        if gates is None or len(gates[0]) == key_heads:
            return ""
        return self._other(f"{len(gates[0])} key heads in a layer", key_heads)

    def _other(self, told: str, here: int) -> str:
        of = f"the gates {self.gates!r}" if isinstance(self.gates, str) else "gates"
        return f"{of} are for {told}, this model has {here}; learn them on it, or leave them out"

    def streams(self, layer: int) -> tuple[bool, ...] | None:
        """Which key heads of a layer stream; None means all of them."""
        gates = self.table
        if gates is None:
            return None
        order = sorted((gate, k, h) for k, row in enumerate(gates) for h, gate in enumerate(row))
        chosen = {(k, h) for _, k, h in order[: int(self.sparsity * len(order) + 0.5)]}
        return tuple((layer, h) in chosen for h in range(len(gates[layer])))

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
