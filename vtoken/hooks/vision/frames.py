"""In front of the vision tower: stages choose the frames of a video that its layers see.

Stages see thumbnails, one row per frame (in packed towers per temporal patch, the two frames that are embedded
together), so that videos of any resolution can be compared. Dropped frames never enter the tower's layers; the
rest of the model gets rows of zeros in their place, as for all that is dropped in the encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from vtoken.hooks.state.decide import STILLS, decide
from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Keep, Stage, VisualTokens, offsets_of, positions, uploaded

SIDE = 16  # of a thumbnail
T = TypeVar("T")


@dataclass(frozen=True)
class Chosen:
    """The frames that the stages left.

    Attributes:
        frames: per video, how many there were.
        index: [ΣK] which of all frames of the call stay, ascending.
        steps: the trace entry of each stage, counted in frames of each video.
    """

    frames: tuple[int, ...]
    index: Tensor
    steps: list[StageTrace] = field(default_factory=list)


def choose(stages: Sequence[Stage], x: Tensor, frames: Sequence[int], skipped: Sequence[bool] = ()) -> Chosen:
    """Lets the stages choose among x [ΣF, D], of videos with so many `frames` each. Skipped videos keep all.

    Raises:
        ValueError: a stage left a video without frames, or merged some.
    """
    history = TokenHistory(tuple(frames), torch.cat([torch.arange(n, device=x.device) for n in frames]), tuple(frames))
    index, lengths = torch.arange(len(history.raster_index), device=x.device), tuple(frames)
    parts, steps = [((n, 1, 1),) for n in frames], []
    for stage in stages:
        tokens = VisualTokens.pack(x[index], lengths, parts, range(len(parts)), history.raster_index)
        found = decide(stage, tokens, history, skipped=skipped, amend=partial(chooses, stage))
        history, lengths = found.history, found.keep.lengths
        index = index[found.keep.index.to(index.device)]
        steps.append(found.trace)
    return Chosen(tuple(frames), index, steps)


def chooses(stage: Stage, keep: Keep, one: str = "frame", whole: str = "video") -> Keep:
    """The decision, if it merges nothing and leaves at least one frame (token) of every video (picture).

    Raises:
        ValueError: names the stage.
    """
    if keep.into is not None or 0 in keep.lengths:
        raise ValueError(
            f"stage {stage.name} {f'merged {one}s' if 0 not in keep.lengths else f'dropped every {one} of a {whole}'}: "
            f"a stage of site {stage.site} must leave at least one {one} of every {whole}, and can merge none"
        )
    return keep


def thumbnails(frames: Tensor) -> Tensor:
    """[F, C*SIDE*SIDE] float32: frames [F, C, H, W] averaged over SIDE x SIDE areas."""
    return adaptive_avg_pool2d(frames.detach().float(), SIDE).flatten(1)


def packed_thumbnails(pixels: Tensor, layouts: Sequence[ImageLayout], side: int, area: int) -> Tensor:
    """[ΣF, C*SIDE*SIDE] float32 from the patches [P, C*area] of a packed tower.

    Args:
        layouts: of each video; a token is side x side patches, which follow each other.
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
    """Enters into the state of a packed tower the tokens that are left, and the traces. `unit`: patches of a token."""
    each = [layout.tokens // n for layout, n in zip(tower.layouts, chosen.frames, strict=True)]
    device = tower.image.device
    token = tower.history.places
    start, image = offsets_of(chosen.frames, device)[:-1], tower.image[token]
    frame = torch.zeros_like(tower.image)
    frame[token] = tower.history.raster_index // uploaded(each, device)[image] + start[image]
    for step in chosen.steps:
        before = tower.history.counts
        kept = torch.cat([p.to(device) + s for p, s in zip(step.kept, start, strict=True)])
        # Only pictures, whose one frame stays, may have lost tokens by now.
        lengths = tuple(
            n if len(p) == many else len(p) * tokens
            for p, many, tokens, n in zip(step.kept, chosen.frames, each, before, strict=True)
        )
        keep = Keep(positions(torch.isin(frame[token], kept), sum(lengths)), lengths)
        tower.history = tower.history.advance(keep)
        token = token[keep.index]
        tower.traces.append(traced(step, before, tower.history.kept(), unit, lengths))
    tower.live = token[tower.slot[token].argsort()]


def traced(
    step: StageTrace, before: Sequence[int], kept: Sequence[Tensor], unit: int, tokens: Sequence[int]
) -> StageTrace:
    """A trace entry counted in frames, rewritten in tokens: `before` how many there were, `kept` which are left. The
    tower sees `unit` patches for each of the `tokens` of every video."""
    return replace(
        step,
        tokens_in=list(before),
        tokens_out=[len(k) for k in kept],
        kept=list(kept),
        frames=on_host(step.kept),
        patches=[n * unit for n in tokens],
    )


def on_host(parts: Sequence[Tensor]) -> list[list[int]]:
    """The tensors as lists. Asks the device once."""
    together = torch.cat(list(parts)).cpu() if parts else torch.empty(0)
    return [part.tolist() for part in together.split([len(part) for part in parts])]


def untouched(stages: Sequence[Stage], crops: Sequence[int], full: int, unit: int) -> list[StageTrace]:
    """Traces where there is nothing to choose: crops of images (`crops` each, of `full` tokens of `unit` patches) are
    no frames."""
    counts, kept = [full] * sum(crops), [torch.arange(full)] * sum(crops)
    whole = [torch.arange(1)] * len(crops)
    steps = [StageTrace(s.name, s.site, [], [], whole, stood_aside=STILLS) for s in stages]
    return [traced(step, counts, kept, unit, [n * full for n in crops]) for step in steps]


def of_all_frames(values: Tensor, chosen: Chosen) -> Tensor:
    """[ΣK, ...] of the frames that stay -> [ΣF, ...], 0 at the others."""
    wide = values.new_zeros(sum(chosen.frames), *values.shape[1:])
    wide[chosen.index.to(values.device)] = values
    return wide


def expand_to_all_frames(tower: Any, chosen: Chosen, unit: int) -> None:
    """Brings the state of a padded tower, whose crops were the chosen frames, back to all frames of the call. `unit`:
    patches of a token."""
    index, full, many = chosen.index.tolist(), tower.history.full[0], sum(chosen.frames)

    def spread(values: Sequence[T], empty: T) -> list[T]:
        out = [empty] * many
        for i, value in zip(index, values, strict=True):
            out[i] = value
        return out

    device = tower.history.raster_index.device
    nothing, gone = torch.arange(0, device=device), torch.full((full,), -1, device=device)
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
    for step in chosen.steps:
        stay = on_host(step.kept)
        left = {start + p for start, places in zip(starts, stay, strict=False) for p in places}
        before, after = ([full * (frame in some) for frame in range(many)] for some in (alive, left))
        kept = [torch.arange(n) for n in after]
        tower.traces.append(traced(step, before, kept, unit, [len(p) * full for p in step.kept]))
        alive = left
    tower.traces += later
    rows = chosen.index.to(device)
    tower.facts.update({fact: of_all_frames(values, chosen) for fact, values in tower.facts.items()})
    slot = tower.history.slot
    if slot is not None:
        wide = slot.new_full((many, full), -1)
        wide[rows] = slot.view(-1, full)
        slot = wide.flatten()
    counts = tuple(spread(tower.history.counts, 0))
    tower.history = TokenHistory((full,) * many, tower.history.raster_index, counts, slot, complete=False)
