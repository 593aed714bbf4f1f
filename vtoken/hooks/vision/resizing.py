"""In front of a vision tower of variable length: pictures are made smaller, and the tower runs on those.

The prompt keeps its length: the smaller picture's tokens take the places of its upper left corner, which have the same
rows and columns, and all other places are dropped where the language model is entered. What follows a picture then
moves up, see `boundary/resized_positions.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vtoken.hooks.state.decide import decide
from vtoken.hooks.state.run import ImageLayout, segments
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision.pixels import of_pictures
from vtoken.stages import Grid, Keep, Parts, Stage, VisualTokens, place_in_image, uploaded


@dataclass(frozen=True)
class Smaller:
    """The pictures of a call as a stage resizes them.

    Attributes:
        given, wanted: raster (frames, rows, columns) in tokens of each picture, as given and as resized.
        keep: which of the given tokens [ΣN] the smaller pictures' tokens [ΣM] take the places of.
        trace: entry of the stage.
    """

    given: tuple[Grid, ...]
    wanted: tuple[Grid, ...]
    keep: Keep
    trace: StageTrace

    @property
    def acts(self) -> bool:
        """Whether any picture gets smaller."""
        return self.given != self.wanted

    @property
    def layouts(self) -> tuple[ImageLayout, ...]:
        """Layouts of the smaller pictures."""
        each = [torch.arange(t).repeat_interleave(h * w) if t > 1 else None for t, h, w in self.wanted]
        return tuple(ImageLayout(parts, segment) for parts, segment in zip(self.parts, each, strict=True))

    @property
    def parts(self) -> tuple[Parts, ...]:
        """`wanted`, as `parts` of VisualTokens."""
        return tuple((grid,) for grid in self.wanted)

    def grid(self, side: int, like: Tensor) -> Tensor:
        """[images, 3] frames, rows and columns in patches (side x side to a token), typed as the grid `like`;
        [frames, 3], one row per frame, where `like` has one per frame."""
        each = [[t, h * side, w * side] for t, h, w in self.wanted]
        if len(like) != len(each):
            each = [[1, *size] for t, *size in each for _ in range(t)]
        return uploaded(each, like.device, like.dtype)


def planned(stage: Stage, layouts: Sequence[ImageLayout], skipped: Sequence[bool], device: torch.device) -> Smaller:
    """Asks the stage to what sizes it resizes the pictures; skipped ones keep theirs.

    Raises:
        ValueError: it keeps other numbers of tokens than those sizes have, leaves a picture none, or merges.
    """
    parts, lengths = tuple(layout.parts for layout in layouts), tuple(layout.tokens for layout in layouts)
    wanted = stage.resized(lengths, parts)
    assert wanted is not None
    if any(skipped):
        wanted = tuple(p if s else w for p, w, s in zip(parts, wanted, skipped, strict=True))
    history = TokenHistory(lengths, place_in_image(lengths, device), lengths)
    segment = segments(layouts)
    tokens = VisualTokens.pack(
        torch.empty(sum(lengths), 0, device=device),
        lengths,
        parts,
        range(len(parts)),
        history.raster_index,
        segment=None if segment is None else segment.to(device, non_blocking=True),
    )
    found = decide(stage, tokens, history, skipped=skipped)
    keep = of_pictures(stage, found.keep)
    if keep.lengths != tuple(math.prod(grid) for (grid,) in wanted):
        raise ValueError(f"stage {stage.name} keeps {list(keep.lengths)} tokens for pictures resized to {list(wanted)}")
    grids = tuple(grid for (grid,) in wanted)
    return Smaller(tuple(grid for (grid,) in parts), grids, keep, replace(found.trace, resized=list(grids)))


def resampled(pixels: Tensor, plan: Smaller, side: int, channels: int, depth: int) -> Tensor:
    """Resamples patches [P, D] of the given pictures to [P', D] of the smaller ones, in the order of a packed tower.

    Bicubic and antialiased, as image processors resample. Overshoot is clipped to the channel's range in this picture,
    where processors clip to that of pixel values.

    Args:
        side: patches along an edge of a token; depth: frames that a patch spans.
    """
    out, start = [], 0
    edge = math.isqrt(pixels.shape[1] // (channels * depth))
    for (t, h, w), (_, rows, columns) in zip(plan.given, plan.wanted, strict=True):
        patches = pixels[start : (start := start + t * h * w * side**2)]
        if (h, w) != (rows, columns):
            split = patches.detach().float().view(t, h, w, side, side, channels, depth, edge, edge)
            frames = split.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(t * depth, channels, h * side * edge, -1)
            least, most = frames.amin((0, 2, 3), keepdim=True), frames.amax((0, 2, 3), keepdim=True)
            # First across, then down, each clipped, as Pillow and torchvision resample bytes.
            for size in ((h * side * edge, columns * side * edge), (rows * side * edge, columns * side * edge)):
                frames = interpolate(frames, size, mode="bicubic", antialias=True).clamp(least, most)
            split = frames.view(t, depth, channels, rows, side, edge, columns, side, edge)
            patches = split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, pixels.shape[1]).to(pixels.dtype)
        out.append(patches)
    return torch.cat(out)


def put_back(state: Any, plan: Smaller, out: Any) -> Any:
    """Brings what the tower made of the smaller pictures, and its state, to all tokens of the given ones: rows of zeros
    where one has no place in the corner."""
    at, lengths = plan.keep.index, tuple(math.prod(grid) for grid in plan.given)

    def spread(values: Tensor) -> Tensor:
        return values.new_zeros(sum(lengths), *values.shape[1:]).index_copy(0, at.to(values.device), values)

    out.pooler_output = spread(out.pooler_output)
    if (deep := getattr(out, "deepstack_features", None)) is not None:
        out.deepstack_features = [spread(features) for features in deep]
    raster = place_in_image(lengths, at.device)[at]
    history: TokenHistory = state.history
    state.deep = [spread(torch.ones_like(raster, dtype=torch.bool) if d is None else d) for d in state.deep]
    state.facts = {fact: spread(values) for fact, values in state.facts.items()}
    slot = None if history.slot is None else torch.full_like(spread(history.slot), -1).index_copy(0, at, history.slot)
    state.history = TokenHistory(lengths, raster[history.places], history.counts, slot, complete=False)
    state.traces = [plan.trace, *(of_given(trace, plan, raster, lengths) for trace in state.traces)]
    return out


def of_given(trace: StageTrace, plan: Smaller, raster: Tensor, lengths: Sequence[int]) -> StageTrace:
    """A trace entry about tokens of the smaller pictures, rewritten in tokens of the given ones. `raster` [ΣM]: raster
    index of each of the former in its given image."""
    each = [place.to(raster.device) for place in trace.kept]
    places = raster.split(plan.keep.lengths)
    kept = [place[k] for place, k in zip(places, each, strict=True)]
    into = None
    if trace.into is not None:
        into = [
            raster.new_full((n,), -1).index_copy(0, place, torch.where(i < 0, -1, place[i.clamp(min=0)]))
            for n, place, i in zip(lengths, places, trace.into, strict=True)
        ]
    return replace(trace, kept=kept, into=into)
