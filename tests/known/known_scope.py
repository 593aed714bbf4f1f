"""Known answers of SCOPE."""

from __future__ import annotations

import pytest
import torch
from known_divprune import on_circle, unit
from packing import tokens

from vtoken import registry


def coverage(cosine, kept):
    """What all tokens are covered with, summed up one by one; nothing counts less than 0."""
    return sum(max([0.0, *(float(row[s]) for s in kept)]) for row in cosine)


def greedy(features, attention, k, alpha):
    """Each time the set's coverage afresh for every candidate, float64."""
    cosine, kept = unit(features) @ unit(features).T, []
    weight = [float(a) ** alpha for a in attention.double()]
    while len(kept) < k:
        others = [i for i in range(len(features)) if i not in kept]
        gain = {i: (coverage(cosine, [*kept, i]) - coverage(cosine, kept)) * weight[i] for i in others}
        kept.append(max(others, key=lambda i: (round(gain[i], 12), -i)))
    return sorted(kept)


def scope():
    stage = registry.stage("scope")
    # Three tokens look one way, two at a right angle to them, one away from all.
    six = {"features": on_circle(0, 0, 0, 90, 90, 225), "cls_attention": torch.tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.5])}
    assert stage(keep=1).select(tokens(**six)).index.tolist() == [1], "3 x 0.2 before 2 x 0.2 and 1 x 0.5"
    assert stage(keep=2).select(tokens(**six)).index.tolist() == [1, 5], (
        "1 x 0.5 before 2 x 0.2; what is covered adds nothing"
    )
    assert stage(keep=3).select(tokens(**six)).index.tolist() == [1, 3, 5]
    assert stage(keep=5).select(tokens(**six)).index.tolist() == [0, 1, 2, 3, 5], "nothing to gain: the lower index"
    assert stage(keep=2, alpha=0.0).select(tokens(**six)).index.tolist() == [0, 3], "coverage alone"
    assert stage(keep=1, alpha=2.0).select(tokens(**six)).index.tolist() == [5], "1 x 0.25 before 3 x 0.04"
    longer = {**six, "features": six["features"] * torch.tensor([1.0, 9, 1, 0.1, 3, 20])[:, None]}
    assert stage(keep=3).select(tokens(**longer)).index.tolist() == [1, 3, 5], "lengths do not matter"
    with pytest.raises(ValueError, match="alpha"):
        stage(keep=1, alpha=-1.0)

    g = torch.Generator().manual_seed(7)
    lengths, grid = (40, 23, 9), ((1, 5, 8), (1, 23, 1), (1, 3, 3))
    features, attention = torch.randn(72, 6, generator=g), torch.rand(72, generator=g) ** 3
    features[:13] = features[0] + 0.3 * features[:13]
    batch = tokens(torch.zeros(72, 2), lengths, grid, cls_attention=attention, features=features)
    for k, alpha in ((9, 1.0), (5, 0.0), (7, 0.5)):
        keep, want, start = stage(keep=k, alpha=alpha).select(batch), [], 0
        for n in lengths:
            rows = slice(start, start + n)
            want += [start + i for i in greedy(features[rows], attention[rows], k, alpha)]
            start += n
        assert keep.index.tolist() == want and keep.lengths == tuple(min(k, n) for n in lengths)
