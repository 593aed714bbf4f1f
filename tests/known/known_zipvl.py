"""Known answers of ZipVL's two stages: an independent definition in float64, one query at a time, and the quantiser by
hand."""

from __future__ import annotations

import math
from random import Random

import pytest
import torch
from known_cache import layer
from known_sparse import prompt
from pydantic import ValidationError

from vtoken import registry
from vtoken.compressors._zipvl import quantised
from vtoken.stages.cache import CachedLayer, GeneratedBlock


def make(name, **options):
    return registry.stage(name)(**{"recent": 4, "drawn": 6, **({"min_len": 0} if name == "zipvl" else {}), **options})


def important(s, q, k, scale, text):
    """Sorted positions, as the paper's steps have it."""
    heads, n = len(q), len(text)
    at = s.queries(n).tolist()
    newest = list(range(max(0, n - s.recent), n))
    assert at == sorted(set(at)) and at[-len(newest) :] == newest
    assert len(at) == min(n, len(newest) + s.drawn)
    total = [0.0] * n
    for h in range(heads):
        keys = k[h // (heads // len(k))].double()
        for i in at:
            for j, share in enumerate((keys[: i + 1] @ q[h, i].double() * scale).softmax(0).tolist()):
                total[j] += share / heads
    held, count = 0.0, 0
    for share in sorted(total, reverse=True):
        if held >= s.tau * len(at) - 1e-9:
            break
        held, count = held + share, count + 1
    sure = {0, *newest} | (set() if s.text else {j for j in range(n) if text[j]})
    mean = {j: total[j] / sum(i >= j for i in at) for j in range(n) if j not in sure}
    return sorted(sure | set(sorted(mean, key=lambda j: -mean[j])[: max(0, count - len(sure))]))


def zipvl():
    sizes = set()
    for n, tau, text in ((60, 0.6, True), (60, 0.9, False), (90, 0.3, False), (11, 0.8, True), (3, 0.5, False)):
        p = prompt(n, seed=n)
        words = torch.zeros(n, dtype=torch.bool)
        words[: n // 6], words[n - n // 5 :] = True, True
        p = type(p)(p.q, p.k, p.scale, 0, torch.where(words, -1, 0), torch.where(words, -1, 1))
        s = make("zipvl", tau=tau, text=text)
        found = s.reads(p)
        assert found.index.tolist() == important(s, p.q, p.k, p.scale, words.tolist())
        sizes.add(len(found.index) - int(words.sum()))
        the_attention(found, p)
    assert len(sizes) > 3 and max(sizes) > 10, "layers and prompts have numbers of their own"
    p = prompt(80, seed=1)
    p = type(p)(p.q, p.k, p.scale, 0, torch.zeros(80), torch.zeros(80))
    p.k[:, 0] = -20 * p.q.mean(1).unflatten(0, (2, 2)).mean(1)
    assert make("zipvl", tau=0.2, text=True).reads(p).index[0] == 0, "the first token, whatever it receives"
    counts = [len(make("zipvl", tau=tau).reads(p).index) for tau in (0.2, 0.5, 0.8, 0.95, 1.0)]
    assert counts == sorted(counts) and counts[0] < counts[1] < counts[-1] == 80
    assert torch.equal(make("zipvl", seed=3).queries(500), make("zipvl", seed=3, tau=0.1).queries(500))
    assert not torch.equal(make("zipvl", seed=3).queries(500), make("zipvl", seed=4).queries(500))
    assert torch.equal(make("zipvl", drawn=0).queries(10), torch.arange(6, 10))


def the_attention(found, p):
    n, held = p.length, found.index.tolist()
    v = torch.randn(len(p.k), n, 5, generator=torch.Generator().manual_seed(7))
    out = found.apply(p.q, p.k, v, p.scale)
    for h in range(p.heads):
        keys, values = (x[h // (p.heads // len(p.k))].double() for x in (p.k, v))
        for i in Random(h).sample(range(n), 3):
            seen = [j for j in held if j <= i]
            want = torch.zeros(5, dtype=torch.float64)
            if i in held:
                want = (keys[seen] @ p.q[h, i].double() * p.scale).softmax(0) @ values[seen]
            torch.testing.assert_close(out[h, i].double(), want, atol=1e-5, rtol=1e-4)
    pairs = sum(j <= i for i in held for j in held)
    assert float(found.density()) == pytest.approx(pairs / (n * (n + 1) / 2))


def zipvl_cache():
    x = layer(40, [range(3, 17), range(20, 33)])
    words = [j not in range(3, 17) and j not in range(20, 33) for j in range(40)]
    s = make("zipvl_cache", tau=0.7)
    found = s.compress(x)
    want = important(s, x.queries, x.keys, x.scale, words)
    assert found.index.tolist() == [want] * 2 and len(want) < 40
    assert found.counts == (sum(3 <= j < 17 for j in want), sum(20 <= j < 33 for j in want))
    loose = make("zipvl_cache", tau=0.5, text=True)
    assert loose.compress(x).index.tolist() == [important(loose, x.queries, x.keys, x.scale, words)] * 2
    assert loose.compress(x).counts is None and len(loose.compress(x).index[0]) < sum(words)
    the_bits(x, want)
    what_is_generated(x)
    assert s.slots(100, (60,)) == 100 and make("zipvl_cache", left=0.5).slots(100, (60,)) == 50
    assert make("zipvl_cache", left=0.1).slots(100, (60,)) == 40, "all text stays"
    assert make("zipvl_cache", left=0.1, mode="quantise").slots(100, (60,)) == 100
    assert s.cost(100, (60,), 4, 2, 8) == 2 * 10 * 100 * 4 * 8 and s.cost(5, (3,), 4, 2, 8) == 2 * 5 * 5 * 4 * 8
    with pytest.raises(ValidationError, match="each must be 1 to 8"):
        make("zipvl_cache", bits=(16, 2))


def the_bits(x, want):
    found = make("zipvl_cache", tau=0.7, mode="quantise").compress(x)
    rest = [j for j in range(40) if j not in want]
    channel = [[math.sqrt(max(abs(v) for v in x.values[h, :, c].tolist())) for c in range(8)] for h in range(2)]
    for group, bits in ((want, 4), (rest, 2)):
        steps = 2**bits - 1
        for h in range(2):
            for c in range(8):
                column = x.keys[h, group, c].double().tolist()
                near(found.keys[h, group, c].tolist(), column, steps)
        for j in group:
            token = [x.values[h, j, c].item() / channel[h][c] for h in range(2) for c in range(8)]
            got = [found.values[h, j, c].item() / channel[h][c] for h in range(2) for c in range(8)]
            near(got, token, steps)
    assert found.keys.shape == x.keys.shape and found.keys.dtype == x.keys.dtype
    codes = 2 * 2 * (len(want) * 4 + len(rest) * 2)  # K and V of two heads, 8 channels: 4 bytes at 4 bits, 2 at 2
    minima = 2 * 4 * 2 * (2 * 8) + 2 * 4 * 40  # lowest and highest, fp32: keys per group and channel, values per token
    assert sum(t.nbytes for t in found.tensors()) == codes + minima + 4 * 2 * 8 + 4 * 40, (
        "channel factors and places, too"
    )
    flat = CachedLayer(torch.ones(1, 3, 4), torch.zeros(1, 3, 4), x.queries[:1, :3], x.images, x.slots, 0.3)
    same = quantised(flat.keys, flat.values, ((torch.arange(3), 2), (torch.arange(0), 2)))
    assert torch.equal(same.keys, flat.keys) and torch.equal(same.values, flat.values), "nothing to tell apart"


def what_is_generated(x):
    """Those of the last tokens that the newest query cannot do without, to hold tau of what it attends to."""
    sizes = set()
    for n, tau in ((40, 0.5), (33, 0.8), (25, 1.0), (12, 0.05)):
        s, at = make("zipvl_cache", tau=tau, mode="quantise", every=10), range(n - 10, n)
        query, keys, values = x.queries[:, n - 1], x.keys[:, :n], x.values[:, at.start : n]
        found = s.requantize(GeneratedBlock(keys, values, query, at, x.scale))
        total = sum((keys[h // 2].double() @ query[h].double() * x.scale).softmax(0) for h in range(4)).tolist()
        held, important = 0.0, []
        for j in sorted(range(n), key=lambda j: -total[j]):
            if held < 4 * tau - 1e-9:
                important.append(j)
            held += total[j]
        groups = [
            (g, b) for g, b in (([j for j in at if j in important], 4), ([j for j in at if j not in important], 2)) if g
        ]
        assert [(c.packed.shape[1], c.bits) for c in found.key_groups] == [(len(g), b) for g, b in groups]
        for group, bits in groups:
            rounded = [j - at.start for j in group]
            for h in range(2):
                for c in range(8):
                    near(found.keys[h, rounded, c].tolist(), keys[h, group, c].double().tolist(), 2**bits - 1)
        sizes.add(len(important))
        assert s.requantize_every() == 10 and make("zipvl_cache", every=10).requantize_every() is None
    assert len(sizes) == 4


def near(got, exact, steps):
    """Every number is the nearest of the steps between the lowest and the highest."""
    low, high = min(exact), max(exact)
    step = (high - low) / steps or 1.0
    for a, b in zip(got, exact, strict=True):
        assert a == pytest.approx(low + step * round((b - low) / step), abs=1e-4 + step * 1e-3)
        assert abs(a - b) <= step / 2 + 1e-4
