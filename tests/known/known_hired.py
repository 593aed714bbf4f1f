"""HiRED by hand, and against a definition in whole numbers that goes over the padded canvas of crops token by token."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from packing import tokens
from pydantic import ValidationError

from vtoken import registry
from vtoken.pruners.tokens.hired import share
from vtoken.stages import Fact


def anyres(side, grid, cut=(0, 0), seed=0):
    """A whole of side x side tokens and grid crops of that size, stitched; `cut` rows and columns of padding are gone
    at either edge."""
    rows, columns = grid[0] * side - 2 * cut[0], grid[1] * side - 2 * cut[1]
    y, x = torch.meshgrid(torch.arange(rows) + cut[0], torch.arange(columns) + cut[1], indexing="ij")
    crop = 1 + y // side * grid[1] + x // side
    segment = torch.cat([torch.zeros(side * side, dtype=torch.long), crop.flatten()])
    n, g = len(segment), torch.Generator().manual_seed(seed)
    # Whole numbers, so that ties happen.
    facts = {Fact("cls_attention", layer): torch.randint(0, 40, (n,), generator=g).float() for layer in (None, 0)}
    v = tokens(torch.zeros(n, 2), (n,), parts=(((1, side, side), (1, rows, columns)),), segment=segment)
    return replace(v, facts=facts)


def best(scores, among, k):
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:k])


def expected(v, side, grid, cut, k, alpha, region):
    """Which tokens stay, and how many of each crop."""
    score, early = (v.fact("cls_attention", layer).tolist() for layer in (None, 0))
    members = [[i for i, s in enumerate(v.segment.tolist()) if s == c] for c in range(1 + grid[0] * grid[1])]
    _, rows, columns = v.parts[0][1]
    whole = min(int(k * Fraction(alpha)), len(members[0]))
    left, hits = k - whole, [0] * (len(members) - 1)
    for i in best(early, members[0], int(len(members[0]) * (1 - Fraction(alpha)))):
        if region == "reference":
            hits[i // (side * side // len(hits))] += 1
        else:
            y = int((Fraction(i // side) + Fraction(1, 2)) / side * rows) + cut[0]
            x = int((Fraction(i % side) + Fraction(1, 2)) / side * columns) + cut[1]
            hits[y // side * grid[1] + x // side] += 1
    exact = [Fraction(left * h, sum(hits)) for h in hits]
    sizes = [int(e) for e in exact]
    for c in sorted(range(len(hits)), key=lambda c: (sizes[c] - exact[c], c))[: left - sum(sizes)]:
        sizes[c] += 1
    assert all(n <= len(m) for n, m in zip(sizes, members[1:], strict=True)), "the definition has no overflow"
    sizes = [whole, *sizes]
    return sorted(i for m, n in zip(members, sizes, strict=True) for i in best(score, m, n)), sizes


def by_hand():
    """4 x 4 whole, 2 x 2 crops. Content: four tokens at the upper left, two at the upper right, one in each of the
    others."""
    v = anyres(4, (2, 2))
    early = torch.zeros(len(v.x))
    early[[0, 1, 4, 5, 2, 3, 8, 15]] = 1
    late = torch.arange(len(v.x)).float()
    v = replace(v, facts={Fact("cls_attention"): late, Fact("cls_attention", 0): early})
    keep = registry.stage("hired")(keep=10).select(v)
    # 5 for the whole; 5 * (4, 2, 1, 1) / 8 = 2.5, 1.25, 0.625, 0.625 -> 2, 1, 1, 1.
    assert torch.bincount(v.segment[keep.index]).tolist() == [5, 2, 1, 1, 1]
    # The last tokens of each raster region score highest: crops end at rows 3 and 7, columns 3 and 7 of 8 x 8.
    assert keep.index.tolist() == [11, 12, 13, 14, 15, 16 + 26, 16 + 27, 16 + 31, 16 + 59, 16 + 63]
    # Runs of the raster are rows here: 4, 2, 1 and 1 tokens again, but of other crops' names.
    runs = torch.zeros(len(v.x))
    runs[[0, 4, 8, 12, 13, 14, 15, 9]] = 1
    v = replace(v, facts={Fact("cls_attention"): late, Fact("cls_attention", 0): runs})
    held = {r: registry.stage("hired")(keep=10, region=r).select(v) for r in ("quadrant", "reference")}
    assert torch.bincount(v.segment[held["reference"].index]).tolist() == [5, 1, 1, 1, 2]
    assert torch.bincount(v.segment[held["quadrant"].index], minlength=5).tolist() == [5, 1, 0, 3, 1]


def hired():
    by_hand()
    stage = registry.stage("hired")
    splits = set()
    for side, grid, cut in ((6, (2, 2), (0, 0)), (6, (2, 2), (2, 0)), (6, (1, 3), (0, 1)), (6, (3, 1), (1, 2))):
        for seed, (k, alpha) in enumerate(((40, 0.5), (23, 0.5), (30, 0.29), (17, 0.75))):
            v = anyres(side, grid, cut, seed)
            for region in ("quadrant", "reference"):
                want, sizes = expected(v, side, grid, cut, k, str(alpha), region)
                keep = stage(keep=k, alpha=alpha, region=region).select(v)
                assert keep.index.tolist() == want and keep.lengths == (k,)
                splits.add(tuple(sizes))
    assert len(splits) > 12, "budgets follow the content"

    v = anyres(6, (2, 2))
    n = len(v.x)
    for k in (1, 2, 7, 36, 100, 150, n - 1, n):
        for alpha in (0.0, 0.5, 1.0):
            keep = stage(keep=k, alpha=alpha).select(v)
            assert keep.lengths == (k,) and len(set(keep.index.tolist())) == k, "what does not fit goes elsewhere"
            assert int((v.segment[keep.index] == 0).sum()) >= min(int(alpha * k), 36)
    assert int((v.segment[stage(keep=100, alpha=0.29).select(v).index] == 0).sum()) == 29, (
        "0.29 * 100 is 28.99... in floats"
    )
    assert share(288, (100, 188), (288, 288)) == [100, 188]
    assert share(5, (0, 0), (4, 4)) == [3, 2] and share(6, (9, 1, 0), (2, 3, 4)) == [2, 3, 1]

    one = tokens(cls_attention=torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.3]))
    assert stage(keep=2).select(one).index.tolist() == [1, 3], "one crop: the highest attention"
    with pytest.raises(ValidationError, match="keep: 640 instead of"):
        stage(keep={"per_crop": 128})

    pair = replace(
        tokens(torch.zeros(2 * n + 6, 2), (n, 6, n), parts=(*v.parts, ((2, 1, 3),), *v.parts)),
        segment=torch.cat([v.segment, torch.tensor([0, 0, 0, 1, 1, 1]), v.segment]),
        facts={f: torch.cat([a, torch.arange(6.0), a.flip(0)]) for f, a in v.facts.items()},
    )
    keep = stage(keep=20).select(pair)
    first, video, _ = keep.index.split(keep.lengths)
    assert first.tolist() == stage(keep=20).select(v).index.tolist() and video.tolist() == list(range(n, n + 6))

    gone = torch.ones(n, dtype=torch.bool)
    gone[torch.tensor([0, 7, 40, 41, 100, n - 1])] = False
    thinned = replace(
        tokens(
            torch.zeros(n - 6, 2), (n - 6,), parts=v.parts, raster_index=gone.nonzero()[:, 0], segment=v.segment[gone]
        ),
        facts={f: a[gone] for f, a in v.facts.items()},
    )
    assert stage(keep=20).select(thinned).lengths == (20,)
