"""Known answers of stages that act on pixels: pictures made by hand, and the rule of prediction token by token."""

from __future__ import annotations

import pytest
import torch
from packing import tokens
from pydantic import ValidationError

from vtoken import registry
from vtoken.compressors.pixels.resize import within
from vtoken.pruners.pixels._prediction import along_diagonals

HALF = (0.5, 0.5, 0.5)


def drawn(*pictures):
    """Pictures of one number per token, each token 3 channels of 4 pixels of it, normalised with a mean and std of
    0.5."""
    grids = [torch.tensor(picture, dtype=torch.float64) for picture in pictures]
    x = torch.cat([grid.flatten() for grid in grids])[:, None].expand(-1, 12)
    lengths = tuple(grid.numel() for grid in grids)
    return tokens(((x - 0.5) / 0.5).float(), lengths, tuple((1, *grid.shape) for grid in grids))


def kept(picture, **options):
    """(row, column) of what stays of one picture."""
    index = registry.stage("pixelprune")(**options).select(drawn(picture)).index
    width = len(picture[0])
    return [(i // width, i % width) for i in index.tolist()]


def token_by_token(x, threshold, metric):
    """What stays of x [h, w, P], and what is rebuilt, by the rule as it is told."""
    h, w = x.shape[:2]
    rebuilt, stay = x.clone(), torch.zeros(h, w, dtype=torch.bool)

    def alike(a, b):
        gap = (a - b).abs()
        far = {"max": gap.max(), "mae": gap.mean(), "rmse": (gap**2).mean().sqrt()}[metric]
        return bool(far <= threshold)

    for r in range(h):
        for c in range(w):
            if r == c == 0:
                stay[0, 0] = True
                continue
            left = rebuilt[r, c - 1] if c else None
            above = rebuilt[r - 1, c] if r else None
            prediction = left if above is None else above
            if left is not None and above is not None:
                corner = rebuilt[r - 1, c - 1]
                prediction = above if alike(corner, left) and not alike(corner, above) else left
            if alike(x[r, c], prediction):
                rebuilt[r, c] = prediction
            else:
                stay[r, c] = True
    return stay, rebuilt


def rebuilt_from(picture, stay):
    """A picture of numbers from those that stay alone: as `token_by_token`, without looking at the others."""
    h, w = picture.shape
    out = torch.zeros_like(picture)
    for r in range(h):
        for c in range(w):
            if stay[r, c]:
                out[r, c] = picture[r, c]
            elif not r or not c:
                out[r, c] = out[r, c - 1] if c else out[r - 1, c]
            else:
                corner, left, above = out[r - 1, c - 1], out[r, c - 1], out[r - 1, c]
                out[r, c] = above if corner == left and corner != above else left
    return out


def pixelprune():
    # A rectangle: the corner of the page, its own upper corners, what follows it, and where it ends below.
    page = [[0] * 6, [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 0, 0], [0] * 6]
    assert kept(page) == [(0, 0), (1, 1), (1, 4), (4, 1)]
    taller = [page[0], *[page[1]] * 9, page[4]]
    assert kept(taller) == [(0, 0), (1, 1), (1, 4), (10, 1)], "as many of a taller one"
    assert kept([[0] * 5] * 4) == [(0, 0)], "one of a blank page"
    assert kept([[0, 1, 0, 1]] * 3) == [(0, 0), (0, 1), (0, 2), (0, 3)], "upright stripes: the first row"
    assert kept([[0] * 3, [1] * 3, [0] * 3]) == [(0, 0), (1, 0), (2, 0)], "level stripes: the first column"
    board = [[(r + c) % 2 for c in range(4)] for r in range(4)]
    assert len(kept(board)) == 16, "a chessboard: all"
    assert len(kept(board, max_kept=0.9)) == 16
    stage = registry.stage("pixelprune")
    keep = stage(max_kept=0.5).select(drawn(page, board, [[0, 1], [1, 1]]))
    assert keep.lengths == (4, 16, 4), "pictures of which too much would stay keep all"

    g = torch.Generator().manual_seed(0)
    for trial in range(60):
        h, w, levels = (int(torch.randint(low, 8, (1,), generator=g)) for low in (1, 1, 2))
        picture = torch.randint(0, min(levels, 4), (h, w), generator=g) / 8
        if trial % 2:
            picture = picture.repeat_interleave(2, 0).repeat_interleave(3, 1)
        stay = torch.zeros(picture.shape, dtype=torch.bool)
        stay[tuple(torch.tensor(kept(picture.tolist())).T)] = True
        assert torch.equal(stay, token_by_token(picture[..., None], 0, "max")[0])
        assert torch.equal(rebuilt_from(picture, stay), picture), "nothing is lost"
        noisy = picture[..., None] + torch.rand(*picture.shape, 12, generator=g) * 0.1
        for metric in ("max", "mae", "rmse"):
            for threshold in (0.05, 0.11, 0.2):
                want, whole = token_by_token(noisy, threshold, metric)
                got, rebuilt = along_diagonals(noisy, threshold, metric)
                assert torch.equal(got, want) and torch.equal(rebuilt, whole)
                if metric == "max":
                    assert float((rebuilt - noisy).abs().max()) <= threshold

    ramp = [[0.0, 0.1, 0.2, 0.3, 0.4]]
    assert kept(ramp, threshold=0.15, std=HALF) == [(0, 0), (0, 2), (0, 4)], "errors do not add up"
    assert kept(ramp, threshold=0.15, std=(0.25, 0.5, 0.5)) == [(0, 0), (0, 2), (0, 4)]
    assert kept(ramp, threshold=0.15, std=(1.0,) * 3) == [(0, 0), (0, 1), (0, 2), (0, 3), (0, 4)], (
        "in units of the file"
    )
    with pytest.raises(ValidationError, match="add std, the image_std of the processor"):
        stage(threshold=0.1)
    with pytest.raises(ValidationError, match="above 0, one per channel"):
        stage(threshold=0.1, std=(0.5, 0.0, 0.5))
    assert stage(left=0.25).expected_counts((8, 100, 24), (((1, 2, 4),), ((1, 10, 10),), ((3, 2, 4),)), ()) == (
        2,
        25,
        24,
    )


def resize():
    stage = registry.stage("resize")
    grids = (1, 8, 8), (1, 6, 10), (3, 4, 4), (1, 1, 40)
    x = torch.zeros(64 + 60 + 48 + 40, 0)
    shown = tokens(x, (64, 60, 48, 40), grids)
    keep = stage(keep="25%").select(shown)
    # 4 x 4 of 8 x 8; 3 x 5 of 6 x 10; in each of three frames 2 x 2 of 4 x 4; 10 of a line of 40.
    assert keep.lengths == (16, 15, 12, 10)
    first = [8 * r + c for r in range(4) for c in range(4)]
    second = [64 + 10 * r + c for r in range(3) for c in range(5)]
    third = [124 + 16 * f + 4 * r + c for f in range(3) for r in range(2) for c in range(2)]
    assert keep.index.tolist() == [*first, *second, *third, *range(172, 182)]
    assert stage(keep=1).select(shown).lengths == (1, 1, 3, 1), "one token of every frame at least"
    assert stage(keep="100%").select(shown).lengths == (64, 60, 48, 40)
    for height in range(1, 12):
        for width in range(1, 12):
            for budget in range(1, height * width):
                _, rows, columns = within((1, height, width), budget)
                assert rows * columns <= budget and rows <= height and columns <= width
                # No picture of its proportions, each side rounded down, has more.
                scale = (budget / (height * width)) ** 0.5
                if min(height, width) * scale >= 1:
                    assert rows * columns >= int(height * scale + 1e-9) * int(width * scale + 1e-9)
    with pytest.raises(ValidationError, match="tokens per picture"):
        stage(keep={"total": 64})
