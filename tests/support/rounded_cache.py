"""Caches in few bits beside caches that are rounded at full width."""

from __future__ import annotations

import pytest
import tiny
import torch

import vtoken
from vtoken.compressors.cache.zipvl_cache import ZipVLCache
from vtoken.stages.cache import ReplacedKV


def rounded(keys, values, groups):
    """The same quantiser at full width: the numbers are rounded where they are, and nothing is packed."""

    def nearest(x, axes, bits):
        low, high = x.amin(axes, keepdim=True), x.amax(axes, keepdim=True)
        step = (high - low) / (2**bits - 1)
        return torch.where(step > 0, ((x - low) / step).round() * step, 0) + low

    channel = values.float().abs().amax(1, keepdim=True).sqrt()
    channel = torch.where(channel > 0, channel, 1)
    k, v = keys.float(), values.float() / channel
    for index, bits in groups:
        if len(index):
            k[:, index], v[:, index] = nearest(k[:, index], (1,), bits), nearest(v[:, index], (0, 2), bits)
    return k.to(keys.dtype), (v * channel).to(values.dtype)


FEW = {"tau": 0.9, "recent": 2, "drawn": 4, "mode": "quantise"}
some = pytest.mark.parametrize("family", tiny.each("anyres", "deepstack", window=None))


class Wide(ZipVLCache):
    """The same choice of tokens, rounded at full width by `rounded`."""

    name = "zipvl_cache"

    def compress(self, layer):
        found = super().compress(layer)
        ends = [0]
        for codes in found.key_groups:
            ends.append(ends[-1] + codes.packed.shape[1])
        order = found.place.argsort()
        groups = [(order[a:b], c.bits) for a, b, c in zip(ends, ends[1:], found.key_groups, strict=False)]
        return ReplacedKV(*rounded(layer.keys, layer.values, groups))


def both(model, run, **options):
    """What `run` returns with either cache, the packed one first."""
    found = []
    for cls in (ZipVLCache, Wide):
        with vtoken.wrapped(model, [cls(**FEW, **options)]):
            found.append(run())
    return found


def recording(cls=ZipVLCache, **options):
    """A stage that tells what it was asked about the tokens behind the prompt."""
    calls = []

    class Telling(cls):
        name = "zipvl_cache"

        def requantize(self, layer):
            found = super().requantize(layer)
            calls.append((layer, found))
            return found

    return Telling(**FEW, **options), calls
