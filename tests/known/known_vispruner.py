"""Known answers of the methods that mend attention with similarity: VisPruner, HoloV."""

from __future__ import annotations

import torch
from known_divprune import on_circle, unit
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens.holov import shares


def thinned(features, attention, k, important):
    """VisPruner with plain lists, float64."""
    ranked = sorted(range(len(attention)), key=lambda i: (-float(attention[i]), i))
    f, count = unit(features), int(k * important / 100)
    left = ranked[count:]
    while len(left) > k - count:
        even = [t for place, t in enumerate(left) if place % 2 == 0]
        odd = [t for place, t in enumerate(left) if place % 2 == 1]
        drop = min(8, len(left) - (k - count))
        if odd:
            even.sort(key=lambda t: -max(float(f[t] @ f[o]) for o in odd))
        left = even[drop:] + odd
    return sorted(ranked[:count] + left)


def vispruner():
    stage = registry.stage("vispruner")
    # By attention 0 1 2 3 4 5. Token 0 is important; of 1, 3 and 5 two go: the nearest to 2 or 4.
    attention, features = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]), on_circle(0, 0, 10, 85, 100, 180)
    six = tokens(cls_attention=attention, features=features)
    assert stage(keep=4, important=25).select(six).index.tolist() == [0, 2, 4, 5]
    assert stage(keep=4, important=100).select(six).index.tolist() == [0, 1, 2, 3]
    assert stage(keep=1).select(six).index.tolist() == [3], "none important; 0 2 4 go, then 1 and 5"
    g = torch.Generator().manual_seed(5)
    lengths, grid = (60, 37, 12), ((1, 6, 10), (1, 37, 1), (1, 3, 4))
    features, attention = torch.randn(109, 16, generator=g), torch.rand(109, generator=g)
    batch = tokens(torch.zeros(109, 2), lengths, grid, cls_attention=attention, features=features)
    for k, important in ((9, 50), (10, 75), (3, 0), (2, 50), (8, 40)):
        keep = stage(keep=k, important=important).select(batch)
        want, start = [], 0
        for n in lengths:
            rows = slice(start, start + n)
            want += [start + i for i in thinned(features[rows], attention[rows], k, important)]
            start += n
        assert keep.index.tolist() == want and keep.lengths == (k,) * 3


def chunked(x, attention, k, chunks, scaling):
    """HoloV with loops, float64; for shares that fit into their chunks."""
    n, kept, ids, spreads, start = len(x), [], [], [], 0
    for c in range(chunks):
        size = n // chunks + (c < n % chunks)
        ids.append(list(range(start, start + size)))
        start += size
        f, spread = unit(x[ids[c]]), []
        for i in range(size):
            others = [float(f[i] @ f[j]) if i != j else 0.0 for j in range(size)]
            mean = sum(others) / (size - 1)
            spread.append(sum((o - mean) ** 2 for o in others) / (size - 1))
        spreads.append(spread)
    a = attention.double() * 1000
    flat = [v for spread in spreads for v in spread]
    scores = []
    for c in range(chunks):
        of, among = (a[ids[c]], spreads[c]) if scaling == "chunk" else (a, flat)
        scale = float(of.mean()) / (sum(among) / len(among) + 1e-6)
        scores.append(
            sum(float(a[i]) + 0.09 * v * scale for i, v in zip(ids[c], spreads[c], strict=True)) / len(ids[c])
        )
    counts = [int(s / sum(scores) * k) for s in scores]
    for c in sorted(range(chunks), key=lambda c: -scores[c])[: k - sum(counts)]:
        counts[c] += 1
    for c in range(chunks):
        assert counts[c] <= len(ids[c])
        kept += sorted(ids[c], key=lambda i: -float(attention[i]))[: counts[c]]
    return sorted(kept), [s / sum(scores) for s in scores]


def holov():
    stage = registry.stage("holov")
    attention = torch.tensor([0.5, 0.4, 0.2, 0.1, 0.05, 0.25, 0.05, 0.05])
    eight = tokens(torch.eye(8), (8,), ((1, 2, 4),), cls_attention=attention)
    assert stage(keep=4, chunks=2).select(eight).index.tolist() == [0, 1, 2, 5], "1.2 to 0.4: three and one"
    assert stage(keep=4, chunks=1).select(eight).index.tolist() == [0, 1, 2, 5]
    assert stage(keep=3, chunks=2).select(eight).index.tolist() == [0, 1, 2], (
        "2.25 and 0.75: what remains goes to the first"
    )
    ahead = tokens(torch.eye(8), (8,), ((1, 2, 4),), cls_attention=torch.tensor([1.0] * 4 + [0.0] * 4))
    assert stage(keep=6, chunks=2).select(ahead).index.tolist() == [0, 1, 2, 3, 4, 5], "a full chunk hands on"
    assert shares([8.0, 1.0, 1.0], [2, 9, 9], 10) == [2, 4, 4] and shares([1.0, 1.0], [3, 3], 3) == [2, 1]
    assert [len(stage(keep=k)._sizes(576, k)) for k in (64, 128, 192, 576)] == [16, 8, 5, 1]
    assert (
        stage(keep=2)._sizes(11, 2) == [2, 2, 1, 1, 1, 1, 1, 1, 1] and sum(stage(keep=7, chunks=4)._sizes(30, 7)) == 30
    )

    g = torch.Generator().manual_seed(6)
    lengths = (64, 37)
    x, attention = torch.randn(101, 8, generator=g), torch.rand(101, generator=g)
    x[:13] = x[0] + 0.1 * x[:13]
    batch = tokens(x, lengths, ((1, 8, 8), (1, 37, 1)), cls_attention=attention)
    for k, chunks in ((16, 5), (11, 3)):
        shared = []
        for scaling in ("chunk", "image"):
            holov = stage(keep=k, chunks=chunks, scaling=scaling)
            first, share = chunked(x[:64], attention[:64], k, chunks, scaling)
            second = [64 + i for i in chunked(x[64:], attention[64:], k, chunks, scaling)[0]]
            assert holov.select(batch).index.tolist() == first + second
            scores = holov._scores(x[:64], attention[:64], holov._sizes(64, k))
            torch.testing.assert_close(scores / scores.sum(), torch.tensor(share), atol=1e-6, rtol=1e-5)
            shared.append(scores / scores.sum())
        assert (shared[0] - shared[1]).abs().max() > 1e-3
        mean = torch.stack([c.mean() for c in attention[:64].split(holov._sizes(64, k))])
        torch.testing.assert_close(shared[0], mean / mean.sum()), "scaled by chunk the variance cancels"
