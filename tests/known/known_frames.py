"""Known answers of stages that choose frames: by hand, and by definitions in float64 that go frame by frame."""

from __future__ import annotations

import math

import pytest
import torch
from packing import tokens

from vtoken import registry

ANGLES = ([0, 10, 50, 58, 130, 134, 170], [5, 6, 100], [40])


def videos(angles=ANGLES, lengths=(2.0, 0.5)):
    """Frames as arrows in a plane, of different lengths: the cosine of two is that of the angle between them."""
    x = [
        (math.cos(math.radians(a)) * lengths[i % 2], math.sin(math.radians(a)) * lengths[i % 2])
        for video in angles
        for i, a in enumerate(video)
    ]
    counts = tuple(map(len, angles))
    return tokens(torch.tensor(x), counts, tuple((n, 1, 1) for n in counts))


def per_video(keep):
    """Kept frames of each video, counted from its first."""
    index, out, start = keep.index.tolist(), [], 0
    for n, many in zip(keep.lengths, map(len, ANGLES), strict=True):
        out.append([i - start for i in index[:n]])
        index, start = index[n:], start + many
    return out


def frames_uniform():
    stage = registry.stage("frames_uniform")
    assert per_video(stage(keep=2).select(videos())) == [[1, 5], [0, 2], [0]]
    assert per_video(stage(keep="50%").select(videos())) == [[1, 3, 5], [1], [0]]
    assert per_video(stage(keep=7).select(videos())) == [list(range(7)), [0, 1, 2], [0]]
    refuses_budgets(stage)


def frames_farthest():
    stage = registry.stage("frames_farthest")
    # From 0 degrees the farthest is 170, then 58 (of 58 and 130 the one whose nearer neighbour is farther off), then
    # 130.
    for keep, want in ((1, [0]), (2, [0, 6]), (3, [0, 3, 6]), (4, [0, 3, 4, 6])):
        assert per_video(stage(keep=keep).select(videos()))[0] == want
    assert per_video(stage(keep=2).select(videos())) == [[0, 6], [0, 2], [0]]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=g)
    x[7] = x[3]  # a tie goes to the earlier
    for keep in (2, 5, 11):
        got = stage(keep=keep).select(tokens(x, (12,), ((12, 1, 1),))).index.tolist()
        assert got == greedily(x.double(), keep)
    refuses_budgets(stage)


def greedily(x, k):
    chosen = [0]
    while len(chosen) < k:
        rest = [i for i in range(len(x)) if i not in chosen]
        alike = {i: max(float(torch.cosine_similarity(x[i], x[j], dim=0)) for j in chosen) for i in rest}
        chosen.append(min(rest, key=lambda i: (round(alike[i], 12), i)))
    return sorted(chosen)


def frames_changed():
    stage = registry.stage("frames_changed")
    for degrees, want in (
        (9, [[0, 1, 2, 4, 6], [0, 2], [0]]),
        (11, [[0, 2, 4, 6], [0, 2], [0]]),
        (60, [[0, 4], [0, 2], [0]]),
        (3, [[0, 1, 2, 3, 4, 5, 6], [0, 2], [0]]),
    ):
        s = stage(similarity=math.cos(math.radians(degrees)))
        assert per_video(s.select(videos())) == want, degrees
    assert stage(left=0.25).expected_counts((8, 100, 1), (), ()) == (2, 25, 1)


def frames_relevant():
    """Rules by hand, on the scores of a video of ten frames."""
    stage = registry.stage("frames_relevant")
    s = [0.1, 0.2, 0.1, 0.0, 0.9, 0.8, 0.7, 0.0, 0.3, 0.1]
    angles = [[10.0 * i for i in range(10)]]

    def kept(keep, scores=s, **more):
        chosen = stage(keep=keep, relevance=tuple(scores), **more).select(videos(angles))
        assert chosen.lengths == (keep,)
        return chosen.index.tolist()

    assert kept(3, rule="top") == [4, 5, 6] and kept(4, rule="top") == [4, 5, 6, 8]
    # Peaks of the basins 0..3, 3..7 and 7..9; for two, the means of the times 1, 4 and 8 group 1 with 4.
    assert kept(3, rule="anchors") == [1, 4, 8] and kept(2, rule="anchors") == [4, 8]
    assert kept(5, rule="anchors") == [1, 4, 5, 6, 8], "the best of the others fills up"
    # The two best (0.85 of 0.9) stand out from the mean (0.32 of 0.9) by 0.59.
    assert kept(2, rule="aks", threshold=0.5) == [4, 5]
    # By no more than 0.8: halves, of which the first (0.9, 0.2; mean 0.26) does not stand out either, ...
    assert kept(2, rule="aks", depth=1) == [4, 5]
    assert kept(4, rule="aks", depth=1) == [1, 4, 5, 6], "two of each half"
    assert kept(4, rule="aks", depth=2) == [1, 4, 5, 8], "one of each quarter: 0-1, 2-4, 5-6, 7-9"
    assert kept(3, [1.0] * 10, rule="aks", depth=0) == [0, 1, 2], "all alike"
    draws = [kept(2, rule="drawn", seed=seed) for seed in range(400)]
    share = sum(4 in each for each in draws) / len(draws)
    total = sum(s)
    want = s[4] / total + sum(x / total * s[4] / (total - x) for k, x in enumerate(s) if k != 4)
    assert abs(share - want) < 0.08 and not any({3, 7} & {*each} for each in draws), "in proportion, never at 0"
    assert kept(3, [0.0] * 9 + [1.0], rule="drawn") == [0, 1, 9]
    # Other lengths are spread over the time: means of pairs, and the nearest.
    twice = [x for pair in zip(s, s, strict=True) for x in pair]
    assert kept(3, twice, rule="top") == [4, 5, 6]
    assert kept(5, [0.0, 1.0], rule="top") == [5, 6, 7, 8, 9]
    each = stage(keep=1, relevance=((0.0, 1.0), (1.0, 0.0)), rule="top")
    assert each.select(videos([[0, 1], [0, 1], [0]])).index.tolist() == [1, 2, 4], "a list for every video"
    with pytest.raises(ValueError, match="scores of 2 videos and meets 1"):
        each.select(videos([[0, 1]]))
    for bad in ((), (float("nan"),), ((),), "no_such.json"):
        with pytest.raises(ValueError):
            stage(keep=1, relevance=bad)
    with pytest.raises(ValueError, match="not be negative"):
        stage(keep=1, relevance=(-1.0, 1.0), rule="drawn")
    refuses_budgets(lambda keep: stage(keep=keep, relevance=(1.0,)))


def refuses_budgets(stage):
    for keep in ({"per_frame": 2}, {"total": 4}):
        with pytest.raises(ValueError, match="cannot be had before"):
            stage(keep=keep)
