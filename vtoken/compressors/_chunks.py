"""Frames of a prompt, counted through all of its pictures and videos."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import Tensor

from vtoken.stages import Parts, size_of, uploaded


def frames_of(image: Tensor, raster_index: Tensor, parts: Sequence[Parts]) -> Tensor:
    """[N] int64: frame of each token of a row, from 0 at its first picture; -1 at text. A picture, of however many
    crops, is one frame.

    Args:
        image, raster_index: [N] of each token, -1 at text; parts: rasters of every image of the batch.
    """
    frames = [each[0][0] if len(each) == 1 else 1 for each in parts] or [1]
    sizes = [max(1, size_of(each) // n) for each, n in zip(parts, frames, strict=False)] or [1]
    ahead = uploaded(list(accumulate(frames[:-1], initial=0)), image.device)
    seen, own = image >= 0, image.clamp(min=0)
    frame = ahead[own] + raster_index // uploaded(sizes, image.device)[own]
    first = own.masked_fill(~seen, len(frames) - 1).min() if len(image) else 0
    return (frame - ahead[first]).masked_fill(~seen, -1)
