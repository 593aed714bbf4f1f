"""The live visual tokens, what a decision about them must fit, and its entry in the trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vtoken.hooks.state.run import Clock, Lineage
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Keep, Parts, Stage


@dataclass(frozen=True)
class Visual:
    """The live visual tokens of a prefill.

    Attributes:
        lengths, parts, row: per image, as in VisualTokens.
        line, column: [ΣK] batch row and logical column of each token.
        image: [ΣK] image of each token.
        lineage: what became of the unpruned tokens.
        segment: [ΣK] as in VisualTokens.
        closes: [ΣK] newline behind each token's row; None without newlines.
    """

    lengths: tuple[int, ...]
    parts: tuple[Parts, ...]
    row: tuple[int, ...]
    line: Tensor
    column: Tensor
    image: Tensor
    lineage: Lineage
    segment: Tensor | None = None
    closes: Tensor | None = None

    def after(self, keep: Keep, lineage: Lineage | None = None) -> Visual:
        """What a decision leaves; `lineage` if it is known already."""
        index = keep.index.to(self.line.device)
        return replace(
            self,
            lengths=keep.lengths,
            line=self.line[index],
            column=self.column[index],
            image=self.image[index],
            lineage=self.lineage.advance(keep, self.image) if lineage is None else lineage,
            segment=None if self.segment is None else self.segment[index],
            closes=None if self.closes is None else self.closes[index],
        )

    def with_home(self, home: Tensor) -> Visual:
        """The same tokens, after an encoder stage that merged."""
        return replace(self, lineage=replace(self.lineage, home=home))

    def per_row(self, batch: int) -> list[int]:
        out = [0] * batch
        for n, r in zip(self.lengths, self.row, strict=True):
            out[r] += n
        return out


def trace_of(
    stage: Stage,
    before: Sequence[int],
    lineage: Lineage,
    clock: Clock,
    layer: int | None,
    substitutes: dict[str, str] | None = None,
) -> StageTrace:
    kept = lineage.kept()
    return StageTrace(
        stage.name,
        stage.site,
        list(before),
        [len(k) for k in kept],
        kept,
        lineage.into(),
        layer=layer,
        substitutes=substitutes or {},
        clock=clock.milliseconds,
    )


def aside_of(stage: Stage, lineage: Lineage, reason: str, layer: int | None = None) -> StageTrace:
    """The entry of a stage that did nothing."""
    entry = trace_of(stage, lineage.lengths or lineage.full, lineage, Clock(torch.device("cpu")), layer)
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
