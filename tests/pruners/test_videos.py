"""Methods for videos: a batch decides as its videos do alone, whole or thinned out, in low precision too."""

from __future__ import annotations

import pytest
import torch
from packing import tokens

from vtoken import registry
from vtoken.pruners.tokens._video import VideoPruner

GRIDS = ((7, 3, 4), (1, 2, 3), (12, 5, 6), (2, 5, 2))
BUDGETS = (1, 20, "40%", {"per_frame": 3}, {"per_frame": 3, "key_weight": 3})
STAGES = [
    *((name, {"keep": keep}) for name in ("fastvid", "flashvid", "holitom") for keep in BUDGETS),
    *((name, {"keep": "40%", "as_released": True}) for name in ("fastvid", "flashvid", "holitom")),
    ("dycoke", {}),
    ("dycoke", {"as_released": True}),
    ("prunevid", {}),
]


def clip(grid, seed, share, dtype):
    """Tokens of a video whose places drift and are now and then replaced, attention, and which of them are there."""
    g, (frames, places) = torch.Generator().manual_seed(seed), (grid[0], grid[1] * grid[2])
    x = torch.randn(1, places, 16, generator=g) + 0.2 * torch.randn(frames, places, 16, generator=g)
    new = torch.rand(frames, places, generator=g) < 0.3
    x[new] = torch.randn(int(new.sum()), 16, generator=g)
    there = torch.rand(frames * places, generator=g) < share
    there[0] = True
    return x.flatten(0, 1)[there].to(dtype), torch.rand(frames * places, generator=g)[there], there.nonzero()[:, 0]


def packed(clips, grids):
    x, attention, places = (torch.cat(part) for part in zip(*clips, strict=True))
    segment = torch.cat([of // (h * w) for (_, _, of), (_, h, w) in zip(clips, grids, strict=True)])
    lengths = tuple(len(one) for one, _, _ in clips)
    return tokens(x, lengths, grids, raster_index=places, segment=segment, cls_attention=attention)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [1.0, 0.6])
@pytest.mark.parametrize(("name", "options"), STAGES, ids=str)
def test_batch_equals_singles(name, options, share, dtype):
    stage = registry.stage(name)(**options)
    clips = [clip(grid, seed, share, dtype) for seed, grid in enumerate(GRIDS)]
    batch = packed(clips, GRIDS)
    whole, made, start = stage.select(batch), [], 0
    index = whole.index.split(whole.lengths)
    for i, (one, grid) in enumerate(zip(clips, GRIDS, strict=True)):
        single = packed([one], (grid,))
        alone = stage.select(single)
        assert (alone.index + start).tolist() == index[i].tolist()
        made.append(alone.embed(single.x))
        start += len(one[0])
    torch.testing.assert_close(whole.embed(batch.x), torch.cat(made))
    assert whole.lengths[1] == len(clips[1][0]), "a picture passes whole"
    assert sum(whole.lengths) < len(batch.x)
    if share == 1 and stage.counts_are_exact():
        assert whole.lengths == stage.expected_counts(batch.lengths, batch.parts, batch.row)


@pytest.mark.parametrize("name", [n for n in registry.stages() if issubclass(registry.stage(n), VideoPruner)])
def test_keeping_all_is_the_identity(name):
    batch = packed([clip(grid, seed, 1.0, torch.float32) for seed, grid in enumerate(GRIDS)], GRIDS)
    for keep in ("100%", 999, {"per_frame": 30}):
        decision = registry.stage(name)(keep=keep).select(batch)
        assert decision.into is None and torch.equal(decision.apply(batch.x), batch.x)
    with pytest.raises(ValueError, match="have no crops, so per_crop does not fit"):
        registry.stage(name)(keep={"per_crop": 4})
