"""Keys and values in few bits: codes without gaps between them, and what it takes to read them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., ceil(d * bits / 8)] of uint8 codes [..., d], all below 2^bits."""
    if 8 % bits:
        codes, bits = ((codes[..., None] >> _places(bits, 1, codes)) & 1).flatten(-2), 1
    each = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes << _places(each, bits, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """The codes [..., d] that were packed."""
    if 8 % bits:
        codes = unpack(packed, 1, d * bits).unflatten(-1, (d, bits))
        return (codes << _places(bits, 1, codes)).sum(-1, dtype=torch.uint8)
    return ((packed[..., None] >> _places(8 // bits, bits, packed)) & (2**bits - 1)).flatten(-2)[..., :d]


def _places(count: int, bits: int, like: Tensor) -> Tensor:
    """[count] how far each code is shifted in what holds several."""
    return torch.arange(0, count * bits, bits, dtype=torch.uint8, device=like.device)


@dataclass(frozen=True)
class QuantizedTensor:
    """Numbers [Hk, n, d], each the nearest of 2^bits equal steps from a minimum to a maximum.

    Attributes:
        packed: uint8 [Hk, n, ceil(d * bits / 8)].
        low, high: minimum and maximum, broadcast against the numbers; in their dtype, where both are exact and a step
            would not be.
    """

    packed: Tensor
    low: Tensor
    high: Tensor
    bits: int
    d: int

    @classmethod
    def of(cls, x: Tensor, axes: tuple[int, ...], bits: int) -> QuantizedTensor:
        """Minimum and maximum are taken over these axes of x [Hk, n, d], n > 0."""
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        step = _step(low, high, bits)
        codes = torch.where(step > 0, ((x.float() - low.float()) / step).round(), 0).clamp(max=2**bits - 1)
        return cls(pack(codes.to(torch.uint8), bits), low, high, bits, x.shape[-1])

    def read(self) -> Tensor:
        """fp32 [Hk, n, d]."""
        codes = unpack(self.packed, self.bits, self.d).float()
        return codes * _step(self.low, self.high, self.bits) + self.low.float()

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        return replace(self, packed=function(self.packed), low=function(self.low), high=function(self.high))


def _step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    return (high.float() - low.float()) / (2**bits - 1)


@dataclass(frozen=True)
class QuantizedKV:
    """Keys and values [Hk, N, d] of some tokens of a row in few bits; reading `keys` and `values` computes them anew.

    Attributes:
        place: int32 [N] where each token stands among those of all groups, one group after the other.
        peak: [Hk, 1, d] by whose root every channel of the values was divided; zeros count as ones.
        key_groups, value_groups: tokens that were rounded together; in every group of both the same.
    """

    place: Tensor
    peak: Tensor
    key_groups: tuple[QuantizedTensor, ...]
    value_groups: tuple[QuantizedTensor, ...]

    @property
    def length(self) -> int:
        return len(self.place)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(Hk, N, d)."""
        heads, _, d = self.peak.shape
        return heads, self.length, d

    @property
    def keys(self) -> Tensor:
        return self._in_order(self.key_groups).to(self.key_groups[0].low.dtype)

    @property
    def values(self) -> Tensor:
        return (self._in_order(self.value_groups) * factor(self.peak)).to(self.peak.dtype)

    def _in_order(self, groups: tuple[QuantizedTensor, ...]) -> Tensor:
        return torch.cat([codes.read() for codes in groups], 1).index_select(1, self.place)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that is held."""
        groups = (*self.key_groups, *self.value_groups)
        return self.place, self.peak, *(t for codes in groups for t in (codes.packed, codes.low, codes.high))

    def first(self, count: int) -> QuantizedKV:
        """Its first tokens; the codes of the others stay, unread."""
        return replace(self, place=self.place[:count].clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """With the function applied to every tensor, as to move them to another device."""
        keys, values = (tuple(c.map(function) for c in groups) for groups in (self.key_groups, self.value_groups))
        return QuantizedKV(function(self.place), function(self.peak), keys, values)


def factor(peak: Tensor) -> Tensor:
    """What the channels of values are divided by: the root, or 1."""
    root = peak.float().sqrt()
    return torch.where(root > 0, root, 1)
