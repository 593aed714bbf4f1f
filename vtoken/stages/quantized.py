"""Keys and values quantized to a few bits per number: bit-packed codes, and what is needed to dequantize them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., ceil(d * bits / 8)] from uint8 codes [..., d], all below 2^bits."""
    if 8 % bits:
        codes, bits = ((codes[..., None] >> _places(bits, 1, codes)) & 1).flatten(-2), 1
    each = 8 // bits
    codes = F.pad(codes, (0, -codes.shape[-1] % each)).unflatten(-1, (-1, each))
    return (codes << _places(each, bits, codes)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, bits: int, d: int) -> Tensor:
    """The codes [..., d] that `pack` packed."""
    if 8 % bits:
        codes = unpack(packed, 1, d * bits).unflatten(-1, (d, bits))
        return (codes << _places(bits, 1, codes)).sum(-1, dtype=torch.uint8)
    return ((packed[..., None] >> _places(8 // bits, bits, packed)) & (2**bits - 1)).flatten(-2)[..., :d]


def _places(count: int, bits: int, like: Tensor) -> Tensor:
    """[count] shift of each code within a byte (or of each bit within a code)."""
    return torch.arange(0, count * bits, bits, dtype=torch.uint8, device=like.device)


@dataclass(frozen=True)
class QuantizedTensor:
    """Numbers [Hk, n, d], each rounded to one of 2^bits evenly spaced levels from a minimum to a maximum.

    Attributes:
        packed: uint8 [Hk, n, ceil(d * bits / 8)].
        low, high: minimum and maximum, broadcast against the numbers. Stored in their dtype, in which both are exact
            and a step size would not be.
    """

    packed: Tensor
    low: Tensor
    high: Tensor
    bits: int
    d: int

    @classmethod
    def of(cls, x: Tensor, axes: tuple[int, ...], bits: int) -> QuantizedTensor:
        """Quantizes x [Hk, n, d], n > 0. Minimum and maximum are taken over these axes."""
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
    """Keys and values [Hk, N, d] of some tokens of a row, quantized; each access to `keys` or `values` dequantizes
    them.

    Attributes:
        place: int32 [N] index of each token in the concatenation of all groups.
        peak: [Hk, 1, d] largest magnitude per channel of the values, which were divided by its root; zeros count as
            ones.
        key_groups, value_groups: tokens that were quantized together; both have the same tokens in the same groups.
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
        """All tensors, for moving and counting them."""
        groups = (*self.key_groups, *self.value_groups)
        return self.place, self.peak, *(t for codes in groups for t in (codes.packed, codes.low, codes.high))

    def first(self, count: int) -> QuantizedKV:
        """The first `count` tokens; the codes of the others are kept but not read."""
        return replace(self, place=self.place[:count].clone())

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedKV:
        """A copy with the function applied to every tensor, for example to move it to another device."""
        keys, values = (tuple(c.map(function) for c in groups) for groups in (self.key_groups, self.value_groups))
        return QuantizedKV(function(self.place), function(self.peak), keys, values)


def factor(peak: Tensor) -> Tensor:
    """What the channels of the values are divided by: the root of their largest magnitude, or 1 where that is 0."""
    root = peak.float().sqrt()
    return torch.where(root > 0, root, 1)
