"""Codes of few bits: packed without gaps, as near as a step allows, the same numbers as rounding at full width, and the
bytes that are cached."""

from __future__ import annotations

import pytest
import torch
from rounded_cache import rounded

from vtoken.compressors._zipvl import quantised
from vtoken.hooks.state.quantized_layer import Plain, adopt
from vtoken.stages.quantized import QuantizedTensor, pack, unpack

TYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def numbers(n, d, dtype=torch.float32, heads=2):
    g = torch.Generator().manual_seed(n * 100 + d)
    return (torch.randn(heads, n, d, generator=g) * torch.arange(1, d + 1)).to(dtype)


def split(n, important, bits):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    return tuple((part.sort().values, b) for part, b in zip((order[:important], order[important:]), bits, strict=True))


@pytest.mark.parametrize("bits", range(1, 9))
def test_no_gaps_and_nothing_lost(bits):
    g = torch.Generator().manual_seed(bits)
    for d in (1, 2, 3, 7, 8, 80, 129):
        codes = torch.randint(0, 2**bits, (2, 5, d), generator=g, dtype=torch.uint8)
        packed = pack(codes, bits)
        assert packed.shape == (2, 5, -(-d * bits // 8)) and packed.dtype == torch.uint8
        assert torch.equal(unpack(packed, bits, d), codes)
    assert pack(torch.tensor([1, 0, 3, 2], dtype=torch.uint8), 2).tolist() == [1 + (3 << 4) + (2 << 6)]


@pytest.mark.parametrize("bits", range(1, 9))
@TYPES
def test_within_half_a_step(bits, dtype):
    x = numbers(33, 7, dtype)
    for axes in ((1,), (0, 2)):
        low, high = x.double().amin(axes, keepdim=True), x.double().amax(axes, keepdim=True)
        step = (high - low) / (2**bits - 1)
        got = QuantizedTensor.of(x, axes, bits).read().double()
        assert bool(((got - x.double()).abs() <= step / 2 + 1e-5).all())
        assert bool(((got - low) / step - ((got - low) / step).round()).abs().max() < 1e-3), "on the steps"


@TYPES
@pytest.mark.parametrize("bits", [(4, 2), (8, 1), (3, 5)], ids=str)
def test_bit_for_bit_as_rounding_at_full_width(dtype, bits):
    for n, important, d in ((37, 11, 8), (1, 1, 5), (2, 1, 80), (9, 9, 3), (9, 1, 16), (9, 0, 4)):
        keys, values, groups = numbers(n, d, dtype), numbers(n + 1, d, dtype)[:, 1:] * 3, split(n, important, bits)
        found = quantised(keys, values, groups)
        want = rounded(keys, values, groups)
        assert found.keys.dtype == found.values.dtype == dtype
        assert torch.equal(found.keys, want[0]) and torch.equal(found.values, want[1])
        half = found.first((n + 1) // 2)
        assert torch.equal(half.keys, want[0][:, : half.length]) and torch.equal(half.values, want[1][:, : half.length])


def test_constant_channels_and_zeros():
    keys, values = numbers(6, 4), numbers(6, 4)
    keys[:, :, 1], values[:, :, 2], keys[1] = -2.5, 0.0, 7.0
    found = quantised(keys, values, split(6, 2, (4, 2)))
    assert bool((found.keys[:1, :, 1] == -2.5).all()) and bool((found.keys[1] == 7).all())
    assert bool(found.values[:, :, 2].isfinite().all()) and bool(found.keys.isfinite().all())
    flat = quantised(torch.zeros(2, 3, 4), torch.ones(2, 3, 4), split(3, 1, (4, 2)))
    assert bool((flat.keys == 0).all()) and bool((flat.values == 1).all())


@TYPES
def test_bytes_are_those_of_codes_and_what_reads_them(dtype):
    n, important, d, size = 50, 20, 12, dtype.itemsize
    found = quantised(numbers(n, d, dtype), numbers(n, d, dtype), split(n, important, (4, 3)))
    codes = (
        2 * 2 * (important * 6 + (n - important) * 5)
    )  # keys and values of two heads; 12 channels: 6 bytes at 4 bits, 5 at 3
    minima = (
        2 * size * 2 * (2 * d) + 2 * 4 * n
    )  # keys per group, head and channel; values, once evened out fp32, per token
    cached = found.tensors()
    assert sum(t.nbytes for t in cached) == codes + minima + size * 2 * d + 4 * n
    assert sum(t.untyped_storage().nbytes() for t in cached) == sum(t.nbytes for t in cached), (
        "no view of anything larger"
    )


def layer(rows=3, length=9, tail=4):
    """A cache layer of rows of different lengths, and what it is of: keys and values of a DynamicLayer."""
    from transformers.cache_utils import DynamicLayer

    g = torch.Generator().manual_seed(length)
    keys, values = (torch.randn(rows, 2, length, 8, generator=g) for _ in range(2))
    cached = DynamicLayer()
    cached.update(keys[:, :, :2], values[:, :, :2])
    cached, parts = adopt(cached), []
    for r in range(rows):
        own = slice(2 + r, length)  # rows differ: padding at the left
        found = quantised(keys[r, :, own], values[r, :, own], split(length - 2 - r, 2, (4, 2)))
        parts.append((found,) if r else (Plain.of(keys[r, :, own], values[r, :, own]),))
        keys[r, :, 2 : 2 + r], values[r, :, 2 : 2 + r] = 0, 0
        if r:
            keys[r, :, own], values[r, :, own] = found.keys, found.values
    new = [torch.randn(rows, 2, tail, 8, generator=g) for _ in range(2)]
    cached.append(parts, tuple(x[:, :, :0] for x in new))
    cached.update(*new)
    plain = DynamicLayer()
    plain.update(torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2))
    return cached, plain


def same(cached, plain):
    assert torch.equal(cached.keys, plain.keys) and torch.equal(cached.values, plain.values)
    assert cached.get_seq_length() == plain.get_seq_length() and cached.get_mask_sizes(3) == plain.get_mask_sizes(3)


def test_a_layer_is_what_a_dynamic_layer_would_be():
    import copy

    cached, plain = layer()
    same(cached, plain)
    moves = (
        lambda x: x.reorder_cache(torch.tensor([2, 0, 2])),
        lambda x: x.batch_repeat_interleave(2),
        lambda x: x.reorder_cache(torch.tensor([5, 5, 0, 1, 2, 3])),
        lambda x: x.batch_select_indices(torch.tensor([1, 4])),
        lambda x: x.update(torch.ones(2, 2, 1, 8), torch.ones(2, 2, 1, 8)),
        lambda x: x.batch_select_indices(torch.tensor([True, False])),
        lambda x: x.crop(-1),
        lambda x: x.crop(0),
        lambda x: (x.offload(), x.prefetch()),
    )
    twin = None
    for move in moves:
        move(cached), move(plain)
        same(cached, plain)
        twin = twin or copy.deepcopy(cached)
    assert twin.keys.shape[0] == 3, "a copy goes its own way"
    cached.reset()
    assert type(cached) is type(plain) and cached.get_seq_length() == 0
    cached.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8))
    assert cached.keys.shape == (1, 2, 3, 8)


@pytest.mark.parametrize("count", range(1, 13))
def test_crops_reach_into_packed_rows(count):
    """4 tokens of the tail, then up to 5 that every row holds, then what earlier turns left."""
    cached, plain = layer()
    if 4 + 5 < count < 4 + 7:
        return  # padding in some row: PrunedCache.crop refuses before
    cached.crop(-count), plain.crop(-count)
    same(cached, plain)
    cached.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8))
    plain.update(torch.ones(3, 2, 1, 8), torch.ones(3, 2, 1, 8))
    same(cached, plain)
