"""Known answers of the baselines and FasterVLM, worked out by hand or by an independent definition in float64."""

from __future__ import annotations

import torch
from packing import tokens

from vtoken import registry


def fastervlm():
    scores = torch.tensor([0.1, 0.3, 0.2, 0.3, 0.0, 0.3])
    keep = registry.stage("fastervlm")(keep=2).select(tokens(cls_attention=scores))
    assert keep.index.tolist() == [1, 3], "ties go to the lower index, reading order"
    two = registry.stage("fastervlm")(keep="50%").select(
        tokens(lengths=(2, 4), grid=((1, 1, 2), (1, 2, 2)), cls_attention=torch.tensor([0.2, 0.1, 0.1, 0.4, 0.3, 0.9]))
    )
    assert two.index.tolist() == [0, 3, 5] and two.lengths == (1, 2)


def random():
    stage = registry.stage("random")(keep=3, seed=7)
    draw = torch.rand(6, generator=torch.Generator().manual_seed(7)).double()
    want = sorted(sorted(range(6), key=lambda i: -float(draw[i]))[:3])
    assert stage.select(tokens()).index.tolist() == want
    other = stage.model_copy(update={"seed": 8})
    assert other.select(tokens()).index.tolist() != want


def uniform():
    stage = registry.stage("uniform")
    assert stage(keep=4).select(tokens(lengths=(16,), grid=((1, 4, 4),))).index.tolist() == [5, 7, 13, 15]
    assert stage(keep=1).select(tokens(lengths=(9,), grid=((1, 3, 3),))).index.tolist() == [4]
    for n, grid in ((576, (1, 24, 24)), (30, (1, 5, 6)), (7, (1, 7, 1)), (24, (2, 3, 4))):
        for k in range(1, n + 1):
            index = stage(keep=k).select(tokens(lengths=(n,), grid=(grid,))).index
            assert len(index) == k == len(set(index.tolist())) and torch.equal(index, index.sort().values)
    thinned = tokens(lengths=(4,), grid=((1, 4, 4),), raster_index=torch.tensor([0, 3, 9, 15]))
    assert stage(keep=2).select(thinned).index.tolist() == [1, 3]


def pool():
    x = torch.tensor([[0.0, 0], [1, 2], [2, 4], [3, 6], [4, 8], [5, 10]])
    keep = registry.stage("pool")(size=2).select(tokens(x))
    assert keep.index.tolist() == [0, 2] and keep.into.tolist() == [0, 0, 1, 0, 0, 1]
    assert keep.apply(x).tolist() == [[2.0, 4.0], [3.5, 7.0]]
    thinned = tokens(x[:3], (3,), ((1, 4, 4),), raster_index=torch.tensor([2, 4, 5]))
    keep = registry.stage("pool")(size=2).select(thinned)
    assert keep.index.tolist() == [0, 1] and keep.into.tolist() == [0, 1, 1], "cells in the order of their first tokens"
    frames = registry.stage("pool")(size=2).select(tokens(lengths=(8,), grid=((2, 2, 2),)))
    assert frames.index.tolist() == [0, 4], "frames are not mixed"
