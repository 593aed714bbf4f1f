"""Packed visual tokens for tests of methods, without a model."""

from __future__ import annotations

import torch

from vtoken.stages import Fact, VisualTokens


def tokens(x=None, lengths=(6,), grid=((1, 2, 3),), row=None, raster_index=None, parts=None, segment=None, **facts):
    """`grid` is one raster per image; `parts` several."""
    parts = tuple((g,) for g in grid) if parts is None else parts
    x = torch.arange(sum(lengths), dtype=torch.float32)[:, None].repeat(1, 2) if x is None else x
    raster_index = torch.cat([torch.arange(n) for n in lengths]) if raster_index is None else raster_index
    row = tuple(range(len(lengths))) if row is None else row
    return VisualTokens.pack(
        x, lengths, parts, row, raster_index, segment=segment, facts={Fact(k): v for k, v in facts.items()}
    )
