"""A forward with visual tokens in it: which are live, what stages decide about them, what layers tell of them."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.decide import decide
from vtoken.hooks.state.forward_state import ForwardState
from vtoken.hooks.state.image_spans import ImageSpans
from vtoken.hooks.state.left_padding import SlotLayout, left_pad, take, too_few
from vtoken.hooks.state.live_tokens import LiveTokens, skipped_entry
from vtoken.hooks.state.prompt_rows import PromptRow
from vtoken.hooks.state.pruned_cache import SlotMap
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Fact, Keep, Stage, VisualTokens, uploaded
from vtoken.stages.query_attention import QueryAttention


@dataclass(frozen=True)
class Observed:
    """What was read off a decoder layer: `values` [B, S, ...] of the slots it attended to, and `index` [B, P], the
    layout of the last P of these at that time."""

    values: Tensor
    index: Tensor

    def now(self, index: Tensor, length: int) -> Tensor:
        """[B, P', ...] values in a later layout `index` [B, P'], which has no tokens but those of this one; length: of
        the prompt in logical columns."""
        values = self.values[:, self.values.shape[1] - self.index.shape[1] :]
        if index is self.index:
            return values
        slots = torch.arange(self.index.shape[1], device=index.device).expand_as(self.index)
        slot_of = index.new_zeros(len(index), length).scatter(1, self.index, slots)
        return take(values, slot_of.gather(1, index), 1)


@dataclass
class AskedText:
    """Per image, the text tokens by which a stage rates it, and layer -> what was read off about their attention."""

    tokens: list[Tensor]
    found: dict[int, Observed] = field(default_factory=dict)


@dataclass
class GroupNotes:
    """What hooks of one layer group tell each other; a new layout begins without any.

    Attributes:
        layer_input: hidden states that the layer at work gave its attention, and cos and sin of their positions.
        query_attention: (layer, row) -> what a sparse prefill found out about a row's queries, for a cache stage.
        rows: the rows of the prompt in this layout.
        image, raster_index: [B, P] of every slot, -1 at text and padding; by_row: what stages of site attention found
            out about rows.
        left_padded: whether the tokens of every row stand at its end.
        physical: [B, L] slot of every logical column that is in this layout.
    """

    layer_input: tuple[Tensor, tuple[Tensor, Tensor]] | None = None
    query_attention: dict[tuple[int, int], QueryAttention] = field(default_factory=dict)
    rows: list[PromptRow] | None = None
    image: Tensor | None = None
    raster_index: Tensor | None = None
    by_row: list[dict[Hashable, Any]] = field(default_factory=list)
    left_padded: bool | None = None
    physical: Tensor | None = None


@dataclass
class PrefillState(ForwardState):
    """A forward with visual tokens in it.

    Attributes:
        live: the live visual tokens; started: all of them before anything was dropped; raster: those, and what the
            padding mask hides.
        spans: where the images came from.
        policy: which newline tokens stay: keep_if_row_has_token, keep or drop.
        deepstack: one tensor [ΣK, D] per decoder layer that adds features to the visual tokens (DeepStack);
            `deepstack_done` of them were added so far.
        answer: [B, L] which logical columns stand behind the prompt (drafts, or an answer that is scored), None without
            any; tails: how many per row; texts: text tokens of each row's prompt; before: see text_before.
        changed: something was dropped or merged.
        lag: [B] how much further decode steps lag behind the model's positions for resized pictures; None: none was.
        min_tokens: visual tokens below which a row runs dense; `skipped`: such a row -> the reason; `skip_reason`: why
            no stage acts at all, or None.
        layouts: first layer of a group -> its layout; logical: of the current one, see SlotLayout.
        pending_slots: slot maps to commit to the cache when the forward ends; shrunk: what a cache stage left of each
            layer.
        notes: of the current layer group; asked: stage (by id) -> the text tokens it asks; reported: stages whose
            skipping is in the trace.
        clears: what was dropped at this layer also leaves the caches of all layers before it; 0: nothing does.
        unpadded: all of the prompt is real.
        began: a clock of the device, and the moment when this prefill began.
        project: makes embeddings of features, where the family's projector takes tokens one by one.
    """

    live: LiveTokens = field(kw_only=True)
    started: LiveTokens = field(kw_only=True)
    raster: LiveTokens = field(kw_only=True)
    trace: Trace = field(kw_only=True)
    spans: ImageSpans = field(kw_only=True)
    policy: str = "keep"
    deepstack: list[Tensor] = field(default_factory=list)
    deepstack_done: int = 0
    answer: Tensor | None = None
    tails: list[int] = field(default_factory=list)
    texts: list[int] = field(default_factory=list)
    before: list[int] | None = None
    labels: Tensor | None = None
    changed: bool = False
    lag: Tensor | None = None
    min_tokens: int = 0
    layouts: dict[int, SlotLayout] = field(default_factory=dict)
    logical: Tensor | None = None
    pending_slots: dict[int, SlotMap] = field(default_factory=dict)
    notes: GroupNotes = field(default_factory=GroupNotes)
    facts: dict[Fact, Observed] = field(default_factory=dict)
    asked: dict[int, AskedText] = field(default_factory=dict)
    reported: set[int] = field(default_factory=set)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    shrunk: dict[int, Any] = field(default_factory=dict)
    clears: int = 0
    unpadded: bool = False
    project: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        newlines = self.spans.newlines
        self.newlines = self.new[0, :0] if newlines is None else self.new[newlines.batch_row, newlines.column]
        visual = self.started.per_row(len(self.counts))
        self.skipped = {row: too_few(n, self.min_tokens) for row, n in enumerate(visual) if n < self.min_tokens}
        self.skip_reason: str | None = None
        self.began: Any = None
        if self.skipped and self.skipped.keys() >= set(self.started.row):
            self.skip_reason = self.skipped[visual.index(max(visual))]

    def decide(
        self,
        stage: Stage,
        x: Tensor,
        facts: dict[Fact, Any],
        layer: int | None = None,
        substitutes: dict[str, str] | None = None,
    ) -> Tensor:
        """Lets a stage choose among the live visual tokens, given their [ΣK, D] values; returns the values that
        remain."""
        v = self.live
        if self.skip_reason is not None:
            self.trace.stages.append(skipped_entry(stage, v.history, self.skip_reason))
            return x
        tokens = VisualTokens.pack(
            x,
            v.lengths,
            *self.spans.as_seen(v, x.device),
            segment=None if v.segment is None else v.segment.to(x.device),
            facts=facts,
            layer=layer,
            memory=self.memory.setdefault(id(stage), {}),
            size=v.history.size,
        )
        found = decide(
            stage,
            tokens,
            v.history,
            skipped=[row in self.skipped for row in v.row] if self.skipped else (),
            amend=self._with_last,
            substitutes=substitutes,
        )
        self.trace.stages.append(found.trace)
        if found.untouched:
            return x
        self.leave(v.after(found.keep, found.history))
        self.deepstack = [found.keep.to(r.device).apply(r) for r in self.deepstack]
        return found.keep.embed(x, self.project) if layer is None else found.keep.apply(x)

    def _with_last(self, keep: Keep) -> Keep:
        """Of a row without text the last token stays: something must be left to answer from."""
        v, lengths = self.live, list(keep.lengths)
        last: list[int] = []
        for row, texts in enumerate(self.texts):
            images = [i for i, r in enumerate(v.row) if r == row and v.lengths[i]]
            if not texts and images and not any(lengths[i] for i in images):
                lengths[images[-1]] = 1
                last.append(sum(v.lengths[: images[-1] + 1]) - 1)
        if not last:
            return keep
        device = keep.index.device
        own = torch.zeros(sum(v.lengths), dtype=torch.bool, device=device)
        return keep.retaining(own.index_fill_(0, uploaded(last, device), True), lengths)

    def leave(self, visual: LiveTokens, *, encoded: bool = False) -> None:
        """From now on only these visual tokens are live, and the newlines that the policy keeps with them. encoded: the
        tower makes the newlines, and has dropped the other tokens itself."""
        batch = len(self.counts)
        before, now = (v.per_row(batch) for v in (self.live, visual))
        self.counts = [n - b + k for n, b, k in zip(self.counts, before, now, strict=True)]
        self.live, self.changed = visual, True
        newlines = self.spans.newlines
        if newlines is not None and (encoded or self.policy != "keep"):
            stay = torch.zeros_like(self.newlines)
            if self.policy != "drop":
                had, has = (self._closed(v) for v in (self.started, visual))
                stay = has | ~had
            for row in self.skipped:
                stay |= newlines.batch_row == row
            lost = (self.newlines & ~stay).long()
            gone = lost.new_zeros(batch).index_add_(0, newlines.batch_row, lost).tolist()
            self.counts = [n - g for n, g in zip(self.counts, gone, strict=True)]
            self.newlines &= stay

    def _closed(self, visual: LiveTokens) -> Tensor:
        """[newlines] bool: which of them close a row of these tokens."""
        assert visual.closed_by is not None
        # Tokens whose row no newline closes (-1) mark the last entry, which is cut off.
        return self.newlines.new_zeros(len(self.newlines) + 1).index_fill_(0, visual.closed_by, True)[:-1]

    def of_last(self, x: Tensor, dim: int) -> Tensor:
        """x [B or 1, ...] at the last prompt token of each row, without `dim`, whose last entries are the slots of the
        current layout."""
        if len(set(self.tails)) == 1:
            return x.select(dim, x.shape[dim] - 1 - self.tails[0])
        at = (x.shape[dim] - 1 - uploaded(self.tails, x.device)).clamp(min=0)
        x = x.expand(len(at), *x.shape[1:])
        index = at.view(-1, *[1] * (x.ndim - 1)).expand(*[1 if d == dim else n for d, n in enumerate(x.shape)])
        return x.gather(dim, index).squeeze(dim)

    def now(self) -> Tensor:
        """[B, P] logical positions that the current layout fills, -1 for padding."""
        positions = self.index + self.past if self.past else self.index
        return positions if self.dense else torch.where(self.valid, positions, -1)

    def _note_slots(self, start: int, before: SlotMap | None, old: Tensor | None) -> None:
        now = self.now()
        self.logical = now if old is None else torch.cat([old, now.to(old.device)], 1)
        if before is not None:
            shift, lags = self._shifted(start, before)
            end = self.past + self.new.shape[1]
            self.pending_slots[start] = SlotMap(self.logical, end, shift, self.dense and before.dense, lags)

    def _shifted(self, start: int, before: SlotMap) -> tuple[Tensor | None, bool]:
        """As in SlotMap. Nothing lags where positions are not compact and no picture was resized."""
        if self.renumbers:
            return self.shift(start), self.changed or before.lags
        if self.lag is None:
            return before.shift, before.lags
        return self.lag if before.shift is None else before.shift + self.lag.to(before.shift.device), True

    def _knows_padding(self) -> bool:
        return self.mask is None or not self.past

    def skip(self, stage: Stage, reason: str) -> None:
        """Enters into the trace that a stage does nothing: once, however many layers it acts at."""
        if id(stage) not in self.reported:
            self.reported.add(id(stage))
            self.trace.stages.append(skipped_entry(stage, self.live.history, reason))

    def left(self) -> Tensor:
        """[B, L] which logical columns are real and not dropped so far, whatever the current layout still holds."""
        left = self.new.clone()
        left[self.started.batch_row, self.started.column] = False
        left[self.live.batch_row, self.live.column] = True
        newlines = self.spans.newlines
        if newlines is not None:
            left[newlines.batch_row, newlines.column] = self.newlines
        return left

    def relayout(self) -> tuple[Tensor, Tensor]:
        """Recomputes `alive` and the layout from `live`; returns the gather from the old layout [B, P'] to the new
        one."""
        first, self.alive = self.alive is self.new, self.left()
        here = self.alive if first else self.alive.gather(1, self.index) & self.valid
        index = left_pad(here, max(self.counts))
        equal = self.unpadded and len(set(self.counts)) == 1
        self.valid = self.new[:, : index.shape[1]] if equal else here.gather(1, index)
        self.notes = GroupNotes()
        self.index = index if first else self.index.gather(1, index)
        return index, self.valid

    def note_layout(self, start: int) -> None:
        """Keeps the current layout as that of the group from layer `start` on."""
        assert self.logical is not None
        self.layouts[start] = SlotLayout(self.index, self.valid, self.logical, self.dense)

    def slot(self) -> tuple[Tensor, Tensor]:
        """(batch row, slot) of every live visual token in the current layout."""
        batch_row, column, notes = self.live.batch_row, self.live.column, self.notes
        if self.alive is self.new and self.unpadded:
            return batch_row, column
        if notes.physical is None:
            rank = self.alive.cumsum(1)
            notes.physical = rank + (self.index.shape[1] - 1 - rank[:, -1:])
        return batch_row, notes.physical[batch_row, column]
