"""Known answers of PruneVid: scenes by hand, the rest by loops in float64."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from known_flashvid import cosine
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens._windows import scenes


def centres(values, count, neighbours):
    """Position of the density peak that each of the values joins."""
    n, d = len(values), len(values[0])
    apart = [[float((a - b).norm()) / math.sqrt(d) for b in values] for a in values]
    near = min(neighbours, n)
    dense = [math.exp(-sum(v * v for v in sorted(row)[:near]) / near) for row in apart]
    most, rank = max(map(max, apart)), []
    for i in range(n):
        above = [apart[i][j] for j in range(n) if (dense[j], -j) > (dense[i], -i)]
        rank.append(min(above, default=most) * dense[i])
    chosen = sorted(range(n), key=lambda i: (-rank[i], i))[:count]
    return [i if i in chosen else min(chosen, key=lambda c: (apart[i][c], chosen.index(c))) for i in range(n)]


def literally(x, similarity, left, share):
    """{(frame, place): value} of what is left of x [frames, places, width]."""
    x, places, out = x.double(), range(x.shape[1]), {}
    windows = scenes(centres([frame.mean(0) for frame in x], max(1, int(len(x) * share)), 7))
    for a, b in windows:
        pairs = list(combinations(range(a, b + 1), 2))
        mean = {p: sum(cosine(x[s, p], x[t, p]) for s, t in pairs) / len(pairs) if pairs else -1.0 for p in places}
        still = [p for p in places if mean[p] > similarity]
        groups = [{(a, p): x[a : b + 1, p].mean(0) for p in still}]
        groups += [{(t, p): x[t, p] for p in places if p not in still} for t in range(a, b + 1)]
        for group in filter(None, groups):
            nodes, count = list(group), max(1, int(len(group) * left))
            home = centres(list(group.values()), count, 7) if len(nodes) > 14 else list(range(len(nodes)))
            for centre in set(home):
                joined = [group[node] for node, to in zip(nodes, home, strict=True) if to == centre]
                out[nodes[centre]] = sum(joined) / len(joined)
    return out


def prunevid():
    stage = registry.stage("prunevid")
    assert scenes([0, 0, 0, 1, 1]) == [(0, 2), (3, 4)]
    assert scenes([0, 0, 1, 0, 2, 2, 2]) == [(0, 1), (2, 6)], "1 and the lone 0 go to the longer run, that of 2"
    assert scenes([0, 0, 1, 2, 2]) == [(0, 2), (3, 4)], "the left one of equals"
    assert scenes([0, 0, 1, 1, 0, 0]) == [(0, 1), (2, 3), (4, 5)], "both longest runs of 0"
    assert scenes([3, 1, 2]) == [(0, 2)] == scenes([1, 1, 1]) and scenes([4, 0, 0]) == [(0, 2)]
    for seed, (frames, per) in enumerate(((8, 30), (12, 18), (4, 16), (9, 9))):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(1, per, 10, generator=g).repeat(frames, 1, 1)
        x[frames // 2 :] = torch.randn(per, 10, generator=g)
        x = 0.3 * (x + 0.1 * torch.randn(x.shape, generator=g))
        moved = torch.rand(frames, per, generator=g) < 0.2
        x[moved] = 0.3 * torch.randn(int(moved.sum()), 10, generator=g)
        n = frames * per
        batch = tokens(torch.cat([x.flatten(0, 1), x[0, :4]]), (n, 4), ((frames, 1, per), (1, 2, 2)))
        for similarity, left, share in ((0.8, 0.5, 0.25), (0.5, 0.3, 0.4), (2 / 3, 0.1, 0.01)):
            keep = stage(similarity=similarity, left=left, scenes=share).select(batch)
            want = literally(x, similarity, left, share)
            assert keep.index[: keep.lengths[0]].tolist() == sorted(t * per + p for t, p in want)
            values = torch.stack([want[node] for node in sorted(want)])
            torch.testing.assert_close(keep.apply(batch.x)[: keep.lengths[0]].double(), values, atol=1e-5, rtol=1e-4)
            assert keep.lengths[1] == 4
    # Nine identical frames of few tokens: the tokens of one, exactly. Without frame 1's first place, that is not still.
    frame = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    keep = stage().select(still := tokens(frame.repeat(9, 1), (54,), ((9, 2, 3),)))
    assert keep.index.tolist() == list(range(6))
    torch.testing.assert_close(keep.apply(still.x), frame)
    rows = torch.tensor([i for i in range(54) if i != 6])
    keep = stage().select(tokens(still.x[rows], (53,), ((9, 2, 3),), raster_index=rows))
    assert rows[keep.index].tolist() == [*range(6), *range(12, 54, 6)]
