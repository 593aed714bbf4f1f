"""In front of the vision tower: which frames of a video its layers see at all.

Stages see thumbnails, one row per frame (in packed towers per temporal patch, the two frames that are embedded together), so that videos of
any resolution can be compared. What they drop never enters the tower's layers; towards the rest of the model the frames come back as rows of
zeros, like all that is dropped in the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vtoken.hooks.state.live_tokens import check, trace_of
from vtoken.hooks.state.run import Clock, Layout, Lineage
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Keep, Stage, VisualTokens, offsets_of

SIDE = 16  # of a thumbnail
T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """What the stages left.

    Attributes:
        frames: per video, how many there were.
        index: [ΣK] rows of all frames of the call that stay, ascending.
        steps: per stage, the frames of each video that stayed, ascending, and the time it took.
    """

    frames: tuple[int, ...]
    index: Tensor
    steps: list[tuple[Stage, list[Tensor], Clock]] = field(default_factory=list)


def choose(stages: Sequence[Stage], x: Tensor, frames: Sequence[int], spared: Sequence[bool] = ()) -> Chosen:
    """Lets the stages choose among the frames x [ΣF, D] of videos of so many frames. Those of spared videos all stay.

    Raises:
        ValueError: a stage left a video without frames, or merged some.
    """
    place = torch.cat([torch.arange(n, device=x.device) for n in frames])
    index, lengths = torch.arange(len(place), device=x.device), tuple(frames)
    parts, steps = [((n, 1, 1),) for n in frames], []
    for stage in stages:
        tokens = VisualTokens.pack(x[index], lengths, parts, range(len(parts)), place[index])
        with Clock(x.device) as clock:
            keep = stage.select(tokens)
        check(stage, keep, lengths)
        if keep.into is not None or 0 in keep.lengths:
            raise ValueError(
                f"stage {stage.name} {'merged frames' if 0 not in keep.lengths else 'dropped every frame of a video'}: a stage of site "
                "frames must choose at least one frame of every video, and can merge none"
            )
        if spared:
            keep = keep.sparing(lengths, spared)
        index, lengths = index[keep.index.to(index.device)], keep.lengths
        steps.append((stage, list(place[index].split(lengths)), clock))
    return Chosen(tuple(frames), index, steps)


def thumbnails(frames: Tensor) -> Tensor:
    """[F, C*SIDE*SIDE] float32: means of frames [F, C, H, W] over a raster of areas."""
    return adaptive_avg_pool2d(frames.detach().float(), SIDE).flatten(1)


def packed_thumbnails(pixels: Tensor, layouts: Sequence[Layout], side: int, area: int) -> Tensor:
    """[ΣF, C*SIDE*SIDE] float32 from the patches [P, C*area] of a packed tower.

    Args:
        layouts: of each video; a token of theirs is side x side patches, which follow each other.
        area: pixels of a patch, in all frames that it spans.
    """
    colour = pixels.detach().unflatten(1, (-1, area)).mean(2, dtype=torch.float32)
    out, start = [], 0
    for layout in layouts:
        ((t, h, w),) = layout.parts
        n = t * h * w * side**2
        raster = colour[start : start + n].view(t, h, w, side, side, -1).permute(0, 5, 1, 3, 2, 4)
        out.append(thumbnails(raster.reshape(t, -1, h * side, w * side)))
        start += n
    return torch.cat(out)


def shorten(tower: Any, chosen: Chosen, unit: int) -> None:
    """Enters into the state of a packed tower which tokens are left, and the traces. `unit`: patches of a token."""
    each = [layout.tokens // n for layout, n in zip(tower.layouts, chosen.frames, strict=True)]
    device = tower.image.device
    token = torch.arange(len(tower.image), device=device)
    start = offsets_of(chosen.frames, device)[:-1]
    frame = tower.lineage.place // torch.tensor(each, device=device)[tower.image] + start[tower.image]
    for stage, places, clock in chosen.steps:
        before = tower.lineage.lengths
        kept = torch.cat([p.to(device) + s for p, s in zip(places, start, strict=True)])
        lengths = tuple(len(p) * n for p, n in zip(places, each, strict=True))
        keep = Keep(torch.isin(frame[token], kept).nonzero()[:, 0], lengths)
        tower.lineage = tower.lineage.advance(keep, tower.image[token])
        token = token[keep.index]
        tower.traces.append(traced(trace_of(stage, before, tower.lineage, clock, None), places, unit, lengths))
    tower.live = token[tower.slot[token].argsort()]


def traced(trace: StageTrace, places: Sequence[Tensor], unit: int, tokens: Sequence[int]) -> StageTrace:
    """With the frames that stayed, and the patches (`unit` to a token) that the tower sees of them."""
    return replace(trace, frames=[p.tolist() for p in places], patches=[n * unit for n in tokens])


def untouched(stages: Sequence[Stage], crops: Sequence[int], full: int) -> list[StageTrace]:
    """Traces where there is nothing to choose: images, whose crops (so many each, of `full` patches) are no frames."""
    counts, kept = [full] * sum(crops), [torch.arange(full)] * sum(crops)
    traces = [StageTrace(s.name, s.site, counts, counts, kept) for s in stages]
    return [traced(trace, [torch.arange(1)] * len(crops), 1, [n * full for n in crops]) for trace in traces]


def lift(tower: Any, chosen: Chosen) -> None:
    """Brings the state of a padded tower, whose crops were the chosen frames, back to all frames of the call."""
    index, full, many = chosen.index.tolist(), tower.full, sum(chosen.frames)

    def spread(values: Sequence[T], empty: T) -> list[T]:
        out = [empty] * many
        for i, value in zip(index, values, strict=True):
            out[i] = value
        return out

    nothing = torch.arange(0, device=tower.rows.device)
    gone = torch.full((full,), -1, device=tower.rows.device)
    later = [
        replace(
            t,
            tokens_in=spread(t.tokens_in, 0),
            tokens_out=spread(t.tokens_out, 0),
            kept=spread(t.kept, nothing),
            into=None if t.into is None else spread(t.into, gone),
        )
        for t in tower.traces
    ]
    starts = offsets_of(chosen.frames, torch.device("cpu")).tolist()
    tower.traces, alive = [], set(range(many))
    for stage, places, clock in chosen.steps:
        left = {start + p for start, place in zip(starts, places, strict=False) for p in place.tolist()}
        before, after = ([full * (frame in some) for frame in range(many)] for some in (alive, left))
        kept = [torch.arange(n) for n in after]
        trace = StageTrace(stage.name, stage.site, before, after, kept, clock=clock.milliseconds)
        tower.traces.append(traced(trace, places, 1, [len(p) * full for p in places]))
        alive = left
    tower.traces += later
    rows = chosen.index.to(tower.rows.device)
    for fact, values in tower.facts.items():
        wide = values.new_zeros(many, *values.shape[1:])
        wide[rows.to(values.device)] = values
        tower.facts[fact] = wide
    home = tower.lineage.home
    if home is not None:
        wide = home.new_full((many, full), -1)
        wide[rows] = home.view(-1, full)
        home = wide.flatten()
    tower.lengths = tuple(spread(tower.lengths, 0))
    tower.lineage = Lineage((full,) * many, tower.lineage.place, tower.lengths, home)
    tower.rows = rows[tower.rows]
