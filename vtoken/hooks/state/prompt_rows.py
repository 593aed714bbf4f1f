"""The rows of a prompt as cache stages see them: what each holds in the current layout, and what a layer leaves of
it."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from vtoken.hooks.state.prefill_state import PrefillState
    from vtoken.stages.cache import CacheStage


@dataclass(frozen=True)
class PromptRow:
    """One row of a prefill in the current layout, and what a layer holds of it.

    Attributes:
        prompt, tail: how many tokens the prompt has; how many follow it (drafts, an answer), which all stay.
        slots: per image, where its visual tokens are among the row's tokens.
        images: the same on the device.
        stay: prompt tokens that a head holds, a mean where heads differ; counts: how many visual tokens of each image
            are among them, None where that is not known.
    """

    prompt: int
    tail: int
    slots: tuple[tuple[int, ...], ...]
    images: tuple[Tensor, ...] = field(default=(), compare=False)
    stay: int = 0
    counts: tuple[int, ...] | None = None

    def columns(self) -> list[int]:
        """Slots that represent those it holds. Heads may hold different visual tokens; here they are the first of each
        image. Masks only ask whether a slot is real, and crop() whether the newest tokens are all there, in order."""
        if self.counts is None:
            kept = list(range(self.stay))
        else:
            gone = {slot for slots, k in zip(self.slots, self.counts, strict=True) for slot in slots[k:]}
            kept = [slot for slot in range(self.prompt) if slot not in gone]
        return [*kept, *range(self.prompt, self.prompt + self.tail)]


def prompt_rows(flow: PrefillState) -> list[PromptRow]:
    """The rows in the current layout, as if a layer had all of their tokens."""
    if flow.notes.rows is None:
        flow.notes.rows = _rows_of(flow)
    return flow.notes.rows


def _rows_of(flow: PrefillState) -> list[PromptRow]:
    v, (_, column) = flow.live, flow.slot()
    ends = list(accumulate(v.lengths, initial=0))
    on_host = column.tolist()
    out = []
    for r, (count, tail) in enumerate(zip(flow.counts, flow.tails, strict=True)):
        begin = flow.index.shape[1] - count
        spans = [span for span, owner in zip(pairwise(ends), v.row, strict=True) if owner == r]
        slots = tuple(tuple(c - begin for c in on_host[a:b]) for a, b in spans)
        images = tuple(column[a:b] - begin for a, b in spans)
        out.append(PromptRow(count - tail, tail, slots, images, count - tail, tuple(map(len, slots))))
    return out


def rasters(flow: PrefillState) -> tuple[Tensor, Tensor, list[dict[Hashable, Any]]]:
    """[B, P] image and raster index of every slot, -1 at text and padding, and what stages found out about its rows."""
    notes = flow.notes
    if notes.image is None or notes.raster_index is None:
        notes.image, notes.raster_index = (torch.full_like(flow.index, -1) for _ in range(2))
        at = flow.slot()
        notes.image[at] = flow.live.image.to(at[0].device)
        notes.raster_index[at] = flow.live.history.raster_index.to(at[0].device)
        notes.by_row = [{} for _ in flow.counts]
    return notes.image, notes.raster_index, notes.by_row


def query_window(flow: PrefillState, stage: CacheStage | None, r: int) -> int:
    """Of how many queries, at the end of a row's prompt, a cache stage will ask for the attention; 0: of none."""
    if stage is None or r in flow.skipped:
        return 0
    row = prompt_rows(flow)[r]
    if not any(row.slots):
        return 0
    behind = row.prompt - 1 - max(slots[-1] for slots in row.slots if slots)
    return stage.query_window(row.prompt, tuple(map(len, row.slots)), behind)
