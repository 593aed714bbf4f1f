"""What the two stages of ZipVL share: which tokens of a prompt are important in a layer; and its quantiser."""

from __future__ import annotations

import torch
from pydantic import BaseModel, Field
from torch import Tensor

from vtoken.probe import Probe, rows_at


class Important(BaseModel):
    """Options of the choice; with the same ones in both stages the second finds what the first worked out."""

    tau: float = Field(
        default=0.975,
        gt=0,
        le=1,
        description="share of the probe's attention that decides how many tokens are important",
    )
    recent: int = Field(default=64, ge=1, description="newest tokens: they probe, and are always important")
    drawn: int = Field(default=64, ge=0, description="older tokens, drawn at random, that probe too")
    seed: int = Field(
        default=0, description="of the draw, which depends on nothing else but the number of older tokens"
    )
    text: bool = Field(default=False, description="text competes with visual tokens; else all of it is important")

    def important(self, probe: Probe, text: Tensor) -> Tensor:
        """[P] ascending positions of the important tokens of a row, the same for all heads. Waits for the device once.

        Args:
            text: [N] bool, what is no visual token.
        """
        key = ("zipvl", self.tau, self.recent, self.drawn, self.seed, self.text)
        found: Tensor = probe.once(key, lambda: self._important(probe, text))
        return found

    def _important(self, probe: Probe, text: Tensor) -> Tensor:
        n, device = len(text), text.device
        slots, at = torch.arange(n, device=device), self.queries(n).to(device)
        parts = [rows_at(q, k, at, probe.scale).sum((0, 1)) for q, k in probe.heads()]
        received = torch.stack(parts).double().sum(0) / len(probe.q)
        enough = (received.sort(descending=True).values.cumsum(0) < self.tau * len(at)).sum() + 1
        always = (slots >= n - self.recent) | (slots == 0)
        always = always if self.text else always | text
        # A late token is seen by fewer queries than an early one.
        mean = received / (at[:, None] >= slots).sum(0)
        count = int(torch.maximum(enough, always.sum()).clamp(max=n))
        return mean.masked_fill(always, torch.inf).argsort(descending=True, stable=True)[:count].sort().values

    def queries(self, n: int) -> Tensor:
        """[R] ascending positions of the tokens of a prompt of n that probe."""
        older = max(0, n - self.recent)
        lots = torch.randperm(older, generator=torch.Generator().manual_seed(self.seed))
        return torch.cat([lots[: self.drawn].sort().values, torch.arange(older, n)])


def quantised(keys: Tensor, values: Tensor, groups: tuple[tuple[Tensor, int], ...]) -> tuple[Tensor, Tensor, int]:
    """Keys and values [Hk, N, d] as they come back from few bits, in their own dtype.

    Keys: minimum and maximum of every channel of every head over the tokens of a group. Values: divided by the root of the largest
    magnitude of their channel over all tokens, then minimum and maximum of every token over heads and channels.

    Args:
        groups: (positions [n], bits) of tokens that are quantised together; every token is in one.

    Returns:
        keys, values, and the bytes that packed codes with minima, scales and channel factors (in the dtype given) would take.
    """
    channel = values.float().abs().amax(1, keepdim=True).sqrt()
    channel = torch.where(channel > 0, channel, 1)
    k, v = keys.float(), values.float() / channel
    new_k, new_v = torch.empty_like(k), torch.empty_like(v)
    heads, _, d = keys.shape
    size = keys.element_size()
    total = heads * d * size
    for index, bits in groups:
        if len(index):
            new_k[:, index] = nearest(k[:, index], (1,), bits)
            new_v[:, index] = nearest(v[:, index], (0, 2), bits)
            codes = 2 * len(index) * heads * -(-d * bits // 8)
            total += codes + 2 * size * (heads * d + len(index))
    return new_k.to(keys.dtype), (new_v * channel).to(values.dtype), total


def nearest(x: Tensor, axes: tuple[int, ...], bits: int) -> Tensor:
    """x at the nearest of 2^bits equal steps from its minimum to its maximum over these axes."""
    low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
    step = (high - low) / (2**bits - 1)
    return torch.where(step > 0, ((x - low) / step).round() * step, 0) + low
