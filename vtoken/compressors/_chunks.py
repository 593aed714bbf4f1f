"""Numbers the frames of a prompt through all its pictures and videos, and groups them into chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from vtoken.stages import Parts, image_of, size_of, uploaded


@dataclass(frozen=True)
class Chunks:
    """Chunks of frames of a row.

    Attributes:
        chunk: [N] chunk of each token, -1 at text; tokens: [chunks] visual tokens of each chunk, before pooling.
        goes_to: [N] token that each is averaged into where its chunk is pooled; weight: [N] its share of the mean.
    """

    chunk: Tensor
    goes_to: Tensor
    weight: Tensor
    tokens: Tensor


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
    last = torch.full((1,), len(frames) - 1, device=image.device)
    first = torch.cat([own.masked_fill(~seen, len(frames) - 1), last]).amin(0, keepdim=True)  # [1]: waits for nothing
    return (frame - ahead[first]).masked_fill(~seen, -1)


def packed(counts: Sequence[int], parts: Sequence[Parts]) -> tuple[Tensor, Tensor]:
    """[ΣN] image and raster index of `counts` tokens of each picture, spaced evenly over its rasters."""
    evenly = [torch.arange(n) * size_of(rasters) // max(1, n) for n, rasters in zip(counts, parts, strict=True)]
    return image_of(counts, torch.device("cpu")), torch.cat(evenly)


def pooled(frame: Tensor, per: int, size: int) -> Chunks:
    """Groups tokens into chunks of `per` frames, given the frame [N] of each, -1 at text. Where a chunk is pooled,
    every `size` neighbours in a frame go to the middle one. Waits for the device once, and works on the host."""
    frame, device = frame.cpu(), frame.device
    (slots,) = (frame >= 0).nonzero(as_tuple=True)
    visual, n = frame[slots], len(slots)
    _, of, sizes = visual.unique_consecutive(return_inverse=True, return_counts=True)
    place = torch.arange(n) - (sizes.cumsum(0) - sizes)[of]
    _, of, sizes = (of * (n + 1) + place // size).unique_consecutive(return_inverse=True, return_counts=True)
    middle = sizes.cumsum(0) - sizes + (sizes - 1) // 2
    goes_to, weight, chunk = torch.arange(len(frame)), torch.ones(len(frame)), torch.full_like(frame, -1)
    goes_to[slots], weight[slots] = slots[middle[of]], 1 / sizes[of]
    numbers = visual.div(per, rounding_mode="floor")
    _, chunk[slots], tokens = numbers.unique_consecutive(return_inverse=True, return_counts=True)
    return Chunks(*(x.to(device, non_blocking=True) for x in (chunk, goes_to, weight, tokens)))
