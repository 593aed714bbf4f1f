"""Shared by the two stages of ZipVL: which tokens of a prompt are important in a layer, and the quantizer."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from vtoken.compressors._rows import rows_at
from vtoken.stages.quantized import QuantizedKV, QuantizedTensor, factor
from vtoken.stages.query_attention import QueryAttention


class Important(BaseModel):
    """Options of the choice. If both stages have the same ones, the second reuses the choice of the first."""

    tau: float = Field(
        default=0.975,
        gt=0,
        le=1,
        description="share of the sampled queries' attention that decides how many tokens are important",
    )
    recent: int = Field(
        default=64, ge=1, description="newest tokens: their queries are sampled, and they are always important"
    )
    drawn: int = Field(default=64, ge=0, description="older tokens, drawn at random, whose queries are sampled too")
    seed: int = Field(
        default=0, description="seed of the draw, which otherwise depends only on the number of older tokens"
    )
    text: bool = Field(default=False, description="text competes with visual tokens; otherwise all text is important")

    def important(self, attention: QueryAttention, text: Tensor) -> Tensor:
        """[P] ascending positions of the important tokens of a row, the same for all heads. Waits for the device once.

        Args:
            text: [N] bool, tokens that are not visual.
        """
        key = ("zipvl", self.tau, self.recent, self.drawn, self.seed, self.text)
        found: Tensor = attention.once(key, lambda: self._important(attention, text))
        return found

    def _important(self, attention: QueryAttention, text: Tensor) -> Tensor:
        n, device = len(text), text.device
        slots, at = torch.arange(n, device=device), self.queries(n).to(device, non_blocking=True)
        parts = [rows_at(q, k, at, attention.scale).sum((0, 1)) for q, k in attention.heads()]
        received = torch.stack(parts).double().sum(0) / len(attention.q)
        enough = (received.sort(descending=True).values.cumsum(0) < self.tau * len(at)).sum() + 1
        always = (slots >= n - self.recent) | (slots == 0)
        always = always if self.text else always | text
        # Fewer queries see a late token than an early one.
        mean = received / (at[:, None] >= slots).sum(0)
        count = int(torch.maximum(enough, always.sum()).clamp(max=n))
        return mean.masked_fill(always, torch.inf).argsort(descending=True, stable=True)[:count].sort().values

    def queries(self, n: int) -> Tensor:
        """[R] ascending positions of the sampled queries in a prompt of n tokens."""
        older = max(0, n - self.recent)
        lots = torch.randperm(older, generator=torch.Generator().manual_seed(self.seed))
        return torch.cat([lots[: self.drawn].sort().values, torch.arange(older, n)])


def quantised(keys: Tensor, values: Tensor, groups: tuple[tuple[Tensor, int], ...]) -> QuantizedKV:
    """Quantizes keys and values [Hk, N, d].

    Keys: minimum and maximum per channel and head, over the tokens of a group. Values: divided by the root of the
    largest magnitude of their channel over all tokens, then minimum and maximum per token, over heads and channels.

    Args:
        groups: (positions [n], bits) of tokens that are quantized together; every token belongs to one group.
    """
    peak = values.abs().amax(1, keepdim=True)
    v = values.float() / factor(peak)
    groups = tuple((index, bits) for index, bits in groups if len(index))
    return QuantizedKV(
        torch.cat([index for index, _ in groups]).argsort().int(),
        peak,
        tuple(QuantizedTensor.of(keys[:, index], (1,), bits) for index, bits in groups),
        tuple(QuantizedTensor.of(v[:, index], (0, 2), bits) for index, bits in groups),
    )
