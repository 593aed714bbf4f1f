"""Known answers of D-CoDe's token half: by hand, and by a definition in float64 that goes token by token."""

from __future__ import annotations

import math

import torch
from packing import tokens

from vtoken import registry


def arrows(degrees, lengths):
    return torch.tensor(
        [(n * math.cos(math.radians(a)), n * math.sin(math.radians(a))) for a, n in zip(degrees, lengths, strict=True)]
    )


def dcode():
    stage = registry.stage("dcode")
    # By length: 3 (30°), 0 (0°), 4 (60°), 2 (5°); 1 and 5 are too short. Within 31° of 3 are all.
    x = arrows([0, 90, 5, 30, 60, 10], [4, 0.5, 2, 5, 3, 0.1])
    keep = stage(keep=4, similarity=math.cos(math.radians(31))).select(tokens(x))
    assert keep.index.tolist() == [3] and keep.into.tolist() == [0, -1, 0, 0, 0, -1]
    # Within 26°: 3 takes 2 only; 0 is alone, for 2 is gone, and so is 4.
    keep = stage(keep=4, similarity=math.cos(math.radians(26))).select(tokens(x))
    assert keep.index.tolist() == [0, 3, 4] and keep.into.tolist() == [0, -1, 1, 1, 2, -1]
    torch.testing.assert_close(keep.apply(x), torch.stack([x[0], (x[2] + x[3]) / 2, x[4]]))
    assert stage(keep=4, similarity=1.0).select(tokens(x)).into is None

    g = torch.Generator().manual_seed(0)
    grid = ((3, 2, 4), (1, 3, 3), (5, 1, 4))
    lengths = tuple(math.prod(each) for each in grid)
    frame = torch.cat([torch.arange(t).repeat_interleave(h * w) for t, h, w in grid])
    for many in (3, 6, 9):
        x = torch.randn(sum(lengths), 3, generator=g)
        found = stage(keep={"per_frame": many}, similarity=0.7).select(tokens(x, lengths, grid, segment=frame))
        index, into, start = [], [-1] * len(x), 0
        for t, h, w in grid:
            for _ in range(t):
                for mean, members in groups(x[start : start + h * w].double(), many, 0.7).items():
                    index.append(start + mean)
                    for member in members:
                        into[start + member] = start + mean
                start += h * w
        index.sort()
        assert found.index.tolist() == index
        assert found.into.tolist() == [-1 if i < 0 else index.index(i) for i in into]
        owner = [next(v for v, end in enumerate((24, 33, 53)) if i < end) for i in index]
        assert found.lengths == tuple(owner.count(v) for v in range(3))


def groups(x, many, similarity):
    """First of each group -> all of it."""
    ranked = sorted(range(len(x)), key=lambda i: (-float(x[i].norm()), i))[:many]
    out = {}
    while ranked:
        first = ranked[0]
        out[first] = [i for i in ranked if float(torch.cosine_similarity(x[i], x[first], dim=0)) >= similarity]
        ranked = [i for i in ranked if i not in out[first]]
    return out
