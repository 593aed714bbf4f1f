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


def refuses_budgets(stage):
    for keep in ({"per_frame": 2}, {"total": 4}):
        with pytest.raises(ValueError, match="before the vision tower"):
            stage(keep=keep)
