"""One forward of the language model: which tokens are visual, which are alive, and the slots they will take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.cache import PrunedCache, Slots
from vtoken.hooks.layout import pack_left, take
from vtoken.run import Clock, Lineage, StageTrace, Trace
from vtoken.stages import Fact, Grid, Keep, Stage, VisualTokens


@dataclass(frozen=True)
class Visual:
    """The live visual tokens of a prefill.

    Attributes:
        lengths, grid, row: per image, as in VisualTokens.
        line, column: [ΣK] batch row and logical column of each token.
        image: [ΣK] image of each token.
        lineage: what became of the unpruned tokens.
    """

    lengths: tuple[int, ...]
    grid: tuple[Grid, ...]
    row: tuple[int, ...]
    line: Tensor
    column: Tensor
    image: Tensor
    lineage: Lineage

    def after(self, keep: Keep) -> Visual:
        index = keep.index.to(self.line.device)
        return replace(
            self,
            lengths=keep.lengths,
            line=self.line[index],
            column=self.column[index],
            image=self.image[index],
            lineage=self.lineage.advance(keep, self.image),
        )

    def with_home(self, home: Tensor) -> Visual:
        """The same tokens, after an encoder stage that merged."""
        return replace(self, lineage=replace(self.lineage, home=home))

    def per_row(self, batch: int) -> list[int]:
        out = [0] * batch
        for n, r in zip(self.lengths, self.row, strict=True):
            out[r] += n
        return out


@dataclass
class Flow:
    """State of one forward.

    Attributes:
        new: [B, L] which of the newest logical tokens are real (not padding).
        real: their number per row, on the host.
        past: logical tokens cached before; mask: the 2D mask of logical length, if any.
        positions: logical position ids [..., B or 1, L].
        alive: [B, L] which logical columns are still in the sequence.
        index, valid: [B, P] the physical layout: column of each slot, and whether it is real.
        visual: the live visual tokens, None when this call holds none; `started` is what it was before anything was dropped.
        source: [ΣN] row of the encoder's packed facts for each unpruned visual token; None when they line up.
        group: first layer of the current layer group; `ok` its 2D mask over `slots` past and new slots (None: all real).
        tail: tokens after the last prompt token: drafts or an answer, whose logits are asked for too.
        over: arguments that later layers get instead of the model's own.
    """

    new: Tensor
    real: list[int]
    past: int
    mask: Tensor | None
    positions: Tensor
    cache: Any
    hidden: Tensor
    alive: Tensor
    index: Tensor
    valid: Tensor
    trace: Trace | None = None
    visual: Visual | None = None
    started: Visual | None = None
    source: Tensor | None = None
    changed: bool = False
    group: int = 0
    ok: Tensor | None = None
    slots: int = 0
    over: dict[str, Any] = field(default_factory=dict)
    memo: dict[str, Any] = field(default_factory=dict)
    records: dict[int, Slots] = field(default_factory=dict)
    facts: dict[Fact, Tensor] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    labels: Tensor | None = None
    tail: int = 0

    @property
    def counts(self) -> list[int]:
        """Live tokens per row, on the host."""
        if self.visual is None or self.started is None:
            return self.real
        before, now = (v.per_row(len(self.real)) for v in (self.started, self.visual))
        return [r - b + n for r, b, n in zip(self.real, before, now, strict=True)]

    def decide(self, stage: Stage, x: Tensor, facts: dict[Fact, Any], layer: int | None = None) -> Tensor:
        """Lets a stage choose among the live visual tokens, given their [ΣK, D] values; returns the values that remain."""
        v = self.visual
        assert v is not None and self.trace is not None
        tokens = VisualTokens.pack(
            x, v.lengths, v.grid, v.row, v.lineage.place.to(x.device), facts=facts, layer=layer,
            memory=self.memory.setdefault(id(stage), {}),
        )
        with Clock(x.device) as clock:
            keep = stage.select(tokens)
        check(stage, keep, v.lengths)
        self.visual = v.after(keep)
        self.trace.stages.append(trace_of(stage, v.lengths, self.visual.lineage, clock, layer))
        return x if keep.into is None and keep.lengths == v.lengths else keep.apply(x)

    def relayout(self) -> tuple[Tensor, Tensor]:
        """Recomputes `alive` and the layout from `visual`; returns the gather from the old layout [B, P'] to the new one."""
        v, start = self.visual, self.started
        assert v is not None and start is not None
        gone = torch.zeros_like(self.alive)
        gone[start.line, start.column] = True
        gone[v.line, v.column] = False
        alive = self.new & ~gone
        index, valid = pack_left(alive.gather(1, self.index) & self.valid, max(self.counts))
        self.alive, self.index, self.valid = alive, self.index.gather(1, index), valid
        return index, valid

    def slot(self) -> tuple[Tensor, Tensor]:
        """(row, physical column) of every live visual token in the current layout."""
        assert self.visual is not None
        line, column = self.visual.line, self.visual.column
        rank = self.alive.cumsum(1)
        return line, rank[line, column] - 1 + self.index.shape[1] - rank[line, -1]

    def shift(self, start: int) -> Tensor:
        """[B] how far the group's positions lag behind the logical ones once this forward is cached (compact positions)."""
        before = self.cache.groups[self.cache.group(start)].shift if isinstance(self.cache, PrunedCache) else 0
        return (self.new & ~self.alive).sum(1) + before

    def compact(self, start: int) -> Tensor:
        """[B, P] renumbered positions of the current layout."""
        dropped = self.new & ~self.alive
        before = self.shift(start)[:, None] - dropped.sum(1, keepdim=True) + dropped.cumsum(1)
        return take(self.positions, self.index, -1) - before.gather(1, self.index).to(self.positions.device)


@dataclass
class StaticStep:
    """A decode step on a static cache whose layer groups differ: fixed shapes, nothing read back from the device."""

    cache: Any
    hidden: Tensor
    memo: dict[int, Any] = field(default_factory=dict)


def trace_of(
    stage: Stage, before: Sequence[int], lineage: Lineage, clock: Clock, layer: int | None
) -> StageTrace:
    kept = lineage.kept()
    return StageTrace(
        stage.name, stage.site, list(before), [len(k) for k in kept], kept, lineage.into(), layer=layer,
        clock=clock.milliseconds,
    )


def check(stage: Stage, keep: Keep, lengths: Sequence[int]) -> None:
    """Refuses a decision that does not fit its tokens, from what the host knows.

    Raises:
        ValueError: names the stage.
    """
    fits = len(keep.lengths) == len(lengths) and all(0 <= k <= n for k, n in zip(keep.lengths, lengths, strict=False))
    if not fits or len(keep.index) != sum(keep.lengths):
        raise ValueError(
            f"stage {stage.name} returned a Keep of {len(keep.index)} tokens, {list(keep.lengths)} per image, "
            f"for images of {list(lengths)} tokens; it must keep 0..N_i of each image"
        )
    if keep.into is not None and len(keep.into) != sum(lengths):
        raise ValueError(f"stage {stage.name} returned `into` of {len(keep.into)} entries for {sum(lengths)} tokens")
