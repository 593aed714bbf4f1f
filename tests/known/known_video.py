"""Known answers of the video methods: by hand, and by definitions in float64 that go token by token."""

from __future__ import annotations

import math

import pytest
import torch
from packing import tokens

from vtoken import registry


def video(grid, seed=0, width=8, images=0, dtype=torch.float32):
    """A video of random tokens, and one-frame images of 2 x 2 behind it."""
    n, grids = math.prod(grid), (grid, *((1, 2, 2),) * images)
    x = torch.randn(n + 4 * images, width, generator=torch.Generator().manual_seed(seed)).to(dtype)
    frame = torch.cat([torch.arange(grid[0]).repeat_interleave(n // grid[0]), torch.zeros(4 * images).long()])
    return tokens(x, (n, *(4,) * images), grids, row=(0,) * len(grids), segment=frame)


def thinned(whole, raster_index):
    """What an earlier stage left of a video."""
    raster_index = torch.tensor(raster_index)
    return tokens(
        whole.x[raster_index],
        (len(raster_index),),
        (whole.parts[0][0],),
        raster_index=raster_index,
        segment=whole.segment[raster_index],
    )


def cosine(a, b):
    a, b = a.double().tolist(), b.double().tolist()
    dot = sum(p * q for p, q in zip(a, b, strict=True))
    return dot / math.sqrt(sum(p * p for p in a) * sum(q * q for q in b))


def changes(v, grid):
    """Tokens of a whole video from the most to the least changed."""
    t, h, w = grid
    score = {i: 255.0 if i < h * w else 1 - cosine(v.x[i], v.x[i - h * w]) for i in range(t * h * w)}
    return sorted(score, key=lambda i: (-score[i], i))


def evs():
    stage = registry.stage("evs")
    # Two places, four frames: the left one turns by 90 degrees at frame 2, the right one by 180 at frame 1 and by 45 at
    # frame 3.
    x = torch.tensor([[1, 0], [0, 1], [3, 0], [0, -1], [0, 2], [0, -2], [0, 1], [1, -1]], dtype=torch.float32)
    grid = (4, 1, 2)
    for keep, want in ((3, [0, 1, 3]), (4, [0, 1, 3, 4]), (5, [0, 1, 3, 4, 7]), (6, [0, 1, 2, 3, 4, 7]), (1, [0, 1])):
        assert stage(keep=keep).select(tokens(x, (8,), (grid,))).index.tolist() == want, keep
    assert stage(keep="25%").select(tokens(x, (8,), (grid,))).index.tolist() == [0, 1]

    for grid in ((3, 2, 4), (5, 3, 3)):
        n = math.prod(grid)
        v = video(grid, images=2)
        for keep in (n // grid[0] + 1, n // 2, n - 1):
            got = stage(keep=keep).select(v)
            assert got.lengths == (keep, 4, 4), "images pass untouched"
            assert got.index[:keep].tolist() == sorted(changes(v, grid)[:keep])
            assert got.index[keep:].tolist() == list(range(n, n + 8))
    assert stage(keep={"total": 7}).select(video((3, 1, 4), images=1)).lengths == (7, 4), "images use up nothing"

    # Place 0 lives in frames 0 and 2, place 1 in frames 1 and 3: each is held against its latest earlier self.
    v = thinned(video((4, 1, 2)), [0, 3, 4, 7])
    least = min((cosine(v.x[2], v.x[0]), 2), (cosine(v.x[3], v.x[1]), 3), key=lambda pair: -pair[0])[1]
    assert stage(keep=3).select(v).index.tolist() == [i for i in range(4) if i != least]
    refuses_segments(stage)


def refuses_segments(stage):
    for keep in ({"per_frame": 2}, {"per_crop": 2}):
        with pytest.raises(ValueError, match=rf"{stage.name} spends one budget .*, so per_.* does not fit"):
            stage(keep=keep)


def gauss(point, centre):
    square = sum((p - c) ** 2 for p, c in zip(point, centre, strict=True))
    return sum(math.exp(-square / (2 * a)) for a in (0.125, 0.25, 0.5, 1, 2))


def average(points):
    return [sum(column) / len(points) for column in zip(*points, strict=True)]


def commonness(x, frames):
    """Per token: how common it is in the video, and how common in its frame (`frames`: lists of token numbers)."""
    columns = list(zip(*x.double().tolist(), strict=True))
    spread = [average([[(value - average([[v] for v in c])[0]) ** 2] for value in c])[0] for c in columns]
    steady = sorted(range(len(columns)), key=lambda c: (spread[c], c))[: len(columns) // 2]
    rows = [[row[c] for c in steady] for row in x.double().tolist()]
    rows = [[v / math.sqrt(sum(u * u for u in row)) for v in row] for row in rows]
    whole, own = average(rows), {i: average([rows[j] for j in f]) for f in frames for i in f}
    return [gauss(row, whole) for row in rows], [gauss(row, own[i]) for i, row in enumerate(rows)]


def shares(in_video, frames, ratio, temperature=0.01):
    """Tokens that the formula gives each frame, before rounding."""
    s = [-average([[in_video[i]] for i in f])[0] for f in frames]
    p = [math.exp((value - max(s)) / temperature) for value in s]
    p = [value / sum(p) for value in p]
    return [ratio * (1 + value - sum(p) / len(p)) * len(f) for value, f in zip(p, frames, strict=True)]


def lowest(score, frames, counts):
    """The tokens of smallest score per frame, ascending."""
    return sorted(i for f, k in zip(frames, counts, strict=True) for i in sorted(f, key=lambda i: (score[i], i))[:k])


def handed_out(wanted, held, k):
    """One token each, then one at a time to the frame that lacks most."""
    counts = [1] * len(held)
    while sum(counts) < k:
        lacking = {f: wanted[f] - counts[f] for f in range(len(held)) if counts[f] < held[f]}
        counts[max(lacking, key=lambda f: (lacking[f], -f))] += 1
    return counts


def vidcom2():
    stage = registry.stage("vidcom2")
    # One steady channel (the second is the louder one): on it tokens are +1 or -1, and the third frame is alone with
    # its -1.
    signs = [1, 1, 1, 1, 1, 1, -1, -1, 1, 1, 1, 1]
    x = torch.tensor([[s, 10.0 * (-1) ** i] for i, s in enumerate(signs)])
    keep = stage(keep="50%").select(tokens(x, (12,), ((6, 1, 2),)))
    assert keep.index.tolist() == [0, 2, 4, 6, 8, 10], "one each; ties to the lower index"
    keep = stage(keep=7).select(tokens(x, (12,), ((6, 1, 2),)))
    assert keep.index.tolist() == [0, 2, 4, 6, 7, 8, 10], "the seventh goes to the frame that stands out"

    for seed, grid in enumerate(((4, 2, 3), (3, 4, 4), (7, 3, 3))):
        n, per = math.prod(grid), grid[1] * grid[2]
        v = video(grid, seed, images=2)
        frames = [list(range(f * per, (f + 1) * per)) for f in range(grid[0])]
        in_video, in_frame = commonness(v.x[:n], frames)
        score = [a + b for a, b in zip(in_video, in_frame, strict=True)]
        for keep in (grid[0], n // 4 + 1, n // 2, n - 2):
            wanted = shares(in_video, frames, keep / n)
            got = stage(keep=keep).select(v)
            assert got.lengths == (keep, 4, 4) and got.index[keep:].tolist() == list(range(n, n + 8))
            assert got.index[:keep].tolist() == lowest(score, frames, handed_out(wanted, [per] * grid[0], keep))
            authors = stage(keep=keep, exact=False).select(v)
            counts = [max(1, round(min(per, w))) for w in wanted]
            assert authors.lengths == (sum(counts), 4, 4)
            assert authors.index[: sum(counts)].tolist() == lowest(score, frames, counts)
    warm = stage(keep=n // 2, temperature=1.0, exact=False).select(v)
    counts = [round(w) for w in shares(in_video, frames, (n // 2) / n, temperature=1.0)]
    assert counts != [round(w) for w in shares(in_video, frames, (n // 2) / n)]
    assert warm.index[: sum(counts)].tolist() == lowest(score, frames, counts)

    # Frames of different size, one of them gone.
    raster_index = [0, 1, 2, 3, 4, 5, 7, 9, 10, 20, 21, 22]
    v = thinned(video((4, 2, 3), 3), raster_index)
    frames = [[i for i, p in enumerate(raster_index) if p // 6 == f] for f in (0, 1, 3)]
    in_video, in_frame = commonness(v.x, frames)
    score = [a + b for a, b in zip(in_video, in_frame, strict=True)]
    for temperature in (0.01, 1.0):
        counts = handed_out(shares(in_video, frames, 7 / 12, temperature), [6, 3, 3], 7)
        got = stage(keep=7, temperature=temperature).select(v)
        assert got.index.tolist() == lowest(score, frames, counts)
    assert stage(keep=1).select(video((5, 2, 2))).lengths == (5,), "a token of every frame"
    assert stage(keep={"total": 7}).select(video((3, 1, 4), images=1)).lengths == (7, 4), "images use up nothing"
    assert stage(keep=9).select(video((3, 2, 4), dtype=torch.bfloat16)).lengths == (9,)
    refuses_segments(stage)
