"""Known answer of DyCoke: by hand, and by a loop over frames and places."""

from __future__ import annotations

import torch
from packing import tokens

from vtoken import registry


def literally(x, left):
    """(frame, place) of what stays of x [frames, places, width]."""
    x, n, kept = x.double(), x.shape[1], []
    for f in range(len(x)):
        of = f - 1 if f % 2 else f - 2 if f % 4 == 2 else f
        alike = [float(torch.cosine_similarity(x[f, p], x[of, p], dim=0)) for p in range(n)]
        ranked = sorted(range(n), key=lambda p: (alike[p], p))
        kept += [(f, p) for p in sorted(ranked if of == f else ranked[: max(1, int(left * n))])]
    return kept


def dycoke():
    stage = registry.stage("dycoke")
    # Two places. Frame 1 differs from 0 on the left, 2 from 0 on the right, 3 from 2 on the left; 4 and 5 repeat 0, 1.
    up, down = [0.0, 1.0], [0.0, -1.0]
    x = torch.tensor([[up, up], [down, up], [up, down], [down, down], [up, up], [down, up]])
    batch = tokens(x.flatten(0, 1), (12,), ((6, 1, 2),))
    assert stage(left=0.5).select(batch).index.tolist() == [0, 1, 2, 5, 6, 8, 9, 10]
    # As released: frame 1 is ranked as 5 is, 3 as 1, 5 as 3; all are on the left. Frame 5 of five is lost.
    assert stage(left=0.5, as_released=True).select(batch).index.tolist() == [0, 1, 2, 5, 6, 8, 9, 10]
    x[5] = torch.tensor([up, down])
    batch = tokens(x.flatten(0, 1), (12,), ((6, 1, 2),))
    assert stage(left=0.5).select(batch).index.tolist() == [0, 1, 2, 5, 6, 8, 9, 11]
    assert stage(left=0.5, as_released=True).select(batch).index.tolist() == [0, 1, 3, 5, 6, 8, 9, 10]
    three = tokens(x[:3].flatten(0, 1), (6,), ((3, 1, 2),))
    assert stage(left=0.5, as_released=True).select(three).index.tolist() == [0, 1, 2]
    assert stage(left=0.5).select(three).index.tolist() == [0, 1, 2, 5]
    still = tokens(torch.ones(16, 3), (16,), ((4, 2, 2),))
    assert stage(left=0.5).select(still).index.tolist() == [*range(6), 8, 9, 12, 13], "ties to the lower place"

    for seed, (frames, height, width) in enumerate(((4, 3, 4), (7, 2, 5), (9, 3, 3))):
        n = frames * height * width
        x = torch.randn(n + 6, 8, generator=torch.Generator().manual_seed(seed))
        batch = tokens(x, (n, 2, 4), ((frames, height, width), (1, 1, 2), (2, 1, 2)))
        for left in (0.1, 0.3, 0.75):
            want = literally(x[:n].unflatten(0, (frames, -1)), left)
            got = stage(left=left).select(batch)
            assert got.index[: got.lengths[0]].tolist() == [f * height * width + p for f, p in want]
            assert got.lengths == (len(want), 2, 3), "pictures pass whole"
            assert got.lengths == stage(left=left).expected_counts(batch.lengths, batch.parts, batch.row)
    # Place 1 of frame 0 is gone, so that of frame 1 is new, however alike it is.
    left = tokens(torch.tensor([up, down, up]), (3,), ((2, 1, 2),), raster_index=torch.tensor([0, 2, 3]))
    assert stage(left=0.5).select(left).index.tolist() == [0, 2]
