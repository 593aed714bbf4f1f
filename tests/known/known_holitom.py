"""Known answers of HoliTom: windows by hand and by trying all cuts, the rest by loops in float64."""

from __future__ import annotations

import math
from itertools import combinations

import torch
from known_flashvid import cosine, peaks
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens._windows import static_windows


def all_cuts(alike):
    """Most tokens that repeat, over all ways to cut the frames."""
    frames, best = len(alike) + 1, 0
    for count in range(frames):
        for cuts in combinations(range(1, frames), count):
            ends = list(zip([0, *cuts], [*cuts, frames], strict=True))
            best = max(best, sum(int(alike[a : b - 1].all(0).sum()) * (b - 1 - a) for a, b in ends if b - 1 > a))
    return best


def literally(x, attention, windows, k, similarity, contextual, released):
    """{(frame, place): value} of what is left of x [frames, places, width]; k tokens, or with `released` so many
    before they are rounded group by group."""
    x, places = x.double(), range(x.shape[1])
    groups = []  # (weight as one of a window, nodes with their values)
    for a, b in windows:
        still = [p for p in places if b > a and all(cosine(x[t, p], x[t + 1, p]) > similarity for t in range(a, b))]
        groups.append((True, {(a, p): x[a : b + 1, p].mean(0) for p in still}))
        groups += [(False, {(t, p): x[t, p] for p in places if p not in still}) for t in range(a, b + 1)]
    groups.sort(key=lambda group: not group[0])
    total = sum(len(nodes) for _, nodes in groups)
    wanted = [len(nodes) * min(1, k / total) for _, nodes in groups]
    if released:
        counts = [round(w) if window else math.ceil(w) for w, (window, _) in zip(wanted, groups, strict=True)]
    else:
        counts = [0] * len(groups)
        while sum(counts) < min(k, total):
            lacking = {
                i: (counts[i] == 0, wanted[i] - counts[i])
                for i, (_, nodes) in enumerate(groups)
                if counts[i] < len(nodes)
            }
            counts[max(lacking, key=lambda i: (lacking[i], -i))] += 1
    left = {}
    for count, (window, nodes) in zip(counts, groups, strict=True):
        best = [] if window else sorted(nodes, key=lambda node: -attention[node])[: round(count * (1 - contextual))]
        left |= {node: nodes[node] for node in best}
        rest = [node for node in nodes if node not in best]
        home = peaks([nodes[node] for node in rest], count - len(best)) if count > len(best) else []
        for centre in set(home):
            others = [nodes[n] for i, n in enumerate(rest) if home[i] == centre and i != centre]
            value = nodes[rest[centre]]
            left[rest[centre]] = 0.6 * value + 0.4 * sum(others) / len(others) if others else value
    return left


def holitom():
    stage = registry.stage("holitom")
    # Three places, four frames: left still throughout, the middle from frame 1 on, the right nowhere.
    alike = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 1, 0]], dtype=torch.bool)
    assert static_windows(alike) == ([(0, 0), (1, 3)], 4), "(0, 3) would save 3"
    assert static_windows(alike[:, 2:]) == ([(0, 0), (1, 1), (2, 2), (3, 3)], 0)
    assert static_windows(torch.ones(5, 7, dtype=torch.bool)) == ([(0, 5)], 35)
    for seed in range(12):
        alike = torch.rand(2 + seed % 6, 5, generator=torch.Generator().manual_seed(seed)) < 0.5
        windows, saved = static_windows(alike)
        assert saved == all_cuts(alike)
        assert [f for a, b in windows for f in range(a, b + 1)] == list(range(len(alike) + 1))
        assert saved == sum(int(alike[a:b].all(0).sum()) * (b - a) for a, b in windows if b > a)

    for seed, (frames, per, k) in enumerate(((6, 9, 20), (5, 14, 16), (8, 7, 30))):
        g = torch.Generator().manual_seed(seed)
        x, attention = torch.randn(1, per, 10, generator=g).repeat(frames, 1, 1), torch.rand(frames, per, generator=g)
        moved = torch.rand(frames, per, generator=g) < 0.2
        x = 0.3 * (x + 0.1 * torch.randn(x.shape, generator=g))
        x[moved] = 0.3 * torch.randn(int(moved.sum()), 10, generator=g)
        n, batch = (
            frames * per,
            tokens(
                torch.cat([x.flatten(0, 1), x[0, :4]]),
                (frames * per, 4),
                ((frames, 1, per), (1, 2, 2)),
                cls_attention=torch.cat([attention.flatten(), attention[0, :4]]),
            ),
        )
        windows, _ = static_windows(torch.cosine_similarity(x[1:], x[:-1], dim=2) > 0.8)
        for contextual, released in ((0.0, False), (0.4, False), (0.0, True)):
            keep = stage(keep=k, contextual=contextual, as_released=released).select(batch)
            want = literally(x, attention, windows, k, 0.8, contextual, released)
            assert keep.index[: keep.lengths[0]].tolist() == sorted(t * per + p for t, p in want)
            values = torch.stack([want[node] for node in sorted(want)])
            torch.testing.assert_close(keep.apply(batch.x)[: keep.lengths[0]].double(), values, atol=1e-5, rtol=1e-4)
            assert keep.lengths[1] == 4 and (released or keep.lengths[0] == k)
        assert stage(keep=n).select(batch).lengths == (n, 4)

    # Nine identical frames: the tokens of one, exactly, whatever more the budget would take.
    frame = torch.randn(6, 8, generator=torch.Generator().manual_seed(1))
    still = tokens(frame.repeat(9, 1), (54,), ((9, 2, 3),), cls_attention=torch.rand(54))
    keep = stage(keep=20).select(still)
    assert keep.lengths == (6,) and keep.index.tolist() == list(range(6))
    torch.testing.assert_close(keep.apply(still.x), frame)
    # Place 0 of frame 1 is gone: it is still nowhere, the other place is.
    left = tokens(
        frame[[0, 1, 1, 0, 1]],
        (5,),
        ((3, 1, 2),),
        raster_index=torch.tensor([0, 1, 3, 4, 5]),
        cls_attention=torch.ones(5),
    )
    assert stage(keep=4).select(left).index.tolist() == [0, 1, 3]
