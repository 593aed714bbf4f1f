"""The live visual tokens, what a decision about them must fit, and its entry in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.state.run import Clock
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Grid, Keep, Parts, Stage, uploaded


@dataclass(frozen=True)
class LiveTokens:
    """The live visual tokens of a prefill.

    Attributes:
        lengths, parts, row: per image, as in VisualTokens.
        batch_row, column: [ΣK] batch row and logical column of each token.
        image: [ΣK] image of each token.
        history: what became of the unpruned tokens.
        segment: [ΣK] as in VisualTokens.
        closed_by: [ΣK] newline behind each token's row; None without newlines.
    """

    lengths: tuple[int, ...]
    parts: tuple[Parts, ...]
    row: tuple[int, ...]
    batch_row: Tensor
    column: Tensor
    image: Tensor
    history: TokenHistory
    segment: Tensor | None = None
    closed_by: Tensor | None = None

    def after(self, keep: Keep, history: TokenHistory | None = None) -> LiveTokens:
        """The tokens that a decision leaves; history: theirs, if it is known already."""
        index = keep.index.to(self.batch_row.device)
        one = slice(len(index)) if len(self.lengths) == 1 else index  # of one image all are alike
        return replace(
            self,
            lengths=keep.lengths,
            batch_row=self.batch_row[one],
            column=self.column[index],
            image=self.image[one],
            history=self.history.advance(keep) if history is None else history,
            segment=None if self.segment is None else self.segment[index],
            closed_by=None if self.closed_by is None else self.closed_by[index],
        )

    def places_in(self, corners: Sequence[Grid]) -> Tensor:
        """[ΣK] raster indices in `corners`: of each image the upper left corner, in which its live tokens lie."""
        at, given = self.history.raster_index, [grid for (grid, *_) in self.parts]
        sides = [[grid[side] for grid in grids] for grids in (given, corners) for side in (1, 2)]
        height, width, rows, columns = (uploaded(values, at.device)[self.image.to(at.device)] for values in sides)
        return (at // (height * width) * rows + at // width % height) * columns + at % width

    def per_row(self, batch: int) -> list[int]:
        out = [0] * batch
        for n, r in zip(self.lengths, self.row, strict=True):
            out[r] += n
        return out


def trace_of(
    stage: Stage,
    before: Sequence[int],
    history: TokenHistory,
    clock: Clock,
    layer: int | None,
    substitutes: dict[str, str] | None = None,
) -> StageTrace:
    into: Any = None if history.slot is None else history.into
    return StageTrace(
        stage.name,
        stage.site,
        list(before),
        list(history.counts),
        history.kept(),
        into,
        layer=layer,
        substitutes=substitutes or {},
        clock=clock.milliseconds,
    )


def skipped_entry(stage: Stage, history: TokenHistory, reason: str, layer: int | None = None) -> StageTrace:
    """The entry of a stage that did nothing."""
    entry = trace_of(stage, history.counts, history, Clock(torch.device("cpu")), layer)
    entry.stood_aside, entry.clock = reason, lambda: 0.0
    return entry


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
