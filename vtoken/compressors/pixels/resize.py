"""Resize: pictures are made smaller before the vision tower, the baseline that every method has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, floor, log, sqrt
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor

from vtoken.stages import (
    Compressor,
    Grid,
    Keep,
    Parts,
    Site,
    VisualTokens,
    image_of,
    keep_all,
    keep_where,
    offsets_of,
    size_of,
)
from vtoken.stages.budget import Budget


class Resize(Compressor):
    """Resamples every picture, and every frame of a video, to fewer pixels before the vision tower runs: bicubic, with
    antialiasing, as image processors do. The model then runs as on the smaller picture: the tower on a smaller grid, a
    shorter prompt, the positions of that prompt. Of the sizes closest to the picture's own proportions it takes the one
    with the most tokens that `keep` allows.

    Needs a family that takes pictures of any size (Qwen, GLM-4V). Where a processor brings all pictures to one size, a
    smaller one saves nothing; `pool` is the nearest baseline there. A processor with a smaller `max_pixels`
    resamples the original picture once; here the processor's output is resampled.

    Paper: https://arxiv.org/abs/2510.07143 (VTC-Bench), where it beats many pruning methods.
    """

    site: ClassVar[Site] = "pixels"
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.07143"
    deviations: ClassVar[str] = (
        "VTC-Bench resizes by a factor and lets the processor round; here the size follows from a budget of tokens. "
        "Bicubic overshoot is clipped to the range of each channel in the picture, where processors clip to 0 and 255, "
        "and levels are not rounded."
    )

    keep: Budget = Field(description="tokens that the smaller picture (video) may have: a count (64) or a share (25%)")

    @field_validator("keep")
    @classmethod
    def _of_each(cls, keep: Budget) -> Budget:
        return keep.of_each("tokens per picture (64)")

    def resized(self, lengths: Sequence[int], parts: Sequence[Parts]) -> tuple[Parts, ...]:
        full = [size_of(image) for image in parts]
        counts = self.keep.counts(full, range(len(full)))
        return tuple(
            tuple(within(grid, count * size_of((grid,)) // n) for grid in image)
            for image, count, n in zip(parts, counts, full, strict=True)
        )

    def select(self, tokens: VisualTokens) -> Keep:
        wanted = self.resized(tokens.lengths, tokens.parts)
        if wanted == tokens.parts:
            return keep_all(tokens)
        device = tokens.x.device
        full = [size_of(image) for image in tokens.parts]
        pairs = [
            pair for image, small in zip(tokens.parts, wanted, strict=True) for pair in zip(image, small, strict=True)
        ]
        mask = torch.cat([corner(grid, small) for grid, small in pairs])
        if tuple(full) == tokens.lengths:
            return Keep(mask.nonzero()[:, 0].to(device, non_blocking=True), tuple(map(size_of, wanted)))
        image = image_of(tokens.lengths, device)
        stay = mask.to(device, non_blocking=True)[tokens.raster_index + offsets_of(full, device)[:-1][image]]
        return keep_where(tokens, stay)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(min(n, size_of(w)) for n, w in zip(lengths, self.resized(lengths, parts), strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return whole


def within(grid: Grid, budget: int) -> Grid:
    """The largest raster in about the proportions of `grid` that holds at most `budget` tokens (at least one a
    frame)."""
    frames, height, width = grid
    most = max(1, budget // frames)
    if most >= height * width:
        return grid
    scale = sqrt(most / (height * width))
    near = [[max(1, floor(n * scale)), min(n, ceil(n * scale))] for n in (height, width)]
    fit = [(h, w) for h in near[0] for w in near[1] if h * w <= most]
    # Of a very long picture one row (or column) is left.
    fit = fit or [(1, min(most, width)) if width > height else (min(most, height), 1)]
    return (frames, *max(fit, key=lambda size: (size[0] * size[1], -abs(log(size[0] * width / (size[1] * height))))))


def corner(grid: Grid, wanted: Grid) -> Tensor:
    """[N] bool on the CPU: the tokens of a raster in its upper left corner of the wanted size."""
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[:, : wanted[1], : wanted[2]] = True
    return mask.flatten()
