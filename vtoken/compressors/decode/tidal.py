"""TidalDecode: a few layers choose what all later layers read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, model_validator

from vtoken.stages.budget import Budget
from vtoken.stages.decode import Choice, DecodeStage, DecodeStep, by_row, highest, packed, widened, with_whole_rows


class Tidal(DecodeStage):
    """At every generated token, layer `layer` and, to correct the choice, layer `correction` read everything; each of
    their key heads chooses the `keep` visual tokens with the highest q . k, mean over its query heads, and in the
    layers that follow, the head of the same index reads these. Layers before `layer` read everything.

    In a decoder some of whose layers keep a state, the next layer with attention takes the place of one without. Where
    stages of site decoder drop tokens of a row, the first layer after the cut reads everything of it and chooses, too
    (`slots_read` does not count that). A correction layer that the decoder does not have is left out.

    Paper: https://arxiv.org/abs/2410.05076
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.05076"
    deviations: ClassVar[str] = (
        "Visual tokens alone are chosen and count in `keep`; text and what was generated are always read. The authors' "
        "code computes all of the attention and masks it; here the chosen tokens alone are read."
    )

    keep: Budget = Field(default=Budget(256), description="visual tokens of each image that a generated token reads")
    layer: int = Field(default=2, ge=0, description="the first decoder layer that chooses")
    correction: int | None = Field(default=9, ge=1, description="the one that chooses again; 13 in Llama-3-8B")

    @model_validator(mode="after")
    def _later(self) -> Tidal:
        if self.correction is not None and self.correction <= self.layer:
            raise ValueError(f"correction {self.correction} must be after layer {self.layer}, or null")
        return self

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(self.layer, depth))

    def incompatibility(self, depth: int, width: int) -> str:
        if self.layer < depth - 1:
            return ""
        return f"layer {self.layer} chooses for the layers after it, and this decoder has layers 0 to {depth - 1}"

    def choose(self, step: DecodeStep) -> Choice | None:
        counts = tuple(min(n, k) for n, k in zip(step.lengths, step.budgets, strict=True))
        choice_of, before = step.shared, step.shared.get("lengths")
        choosing = [True] * len(counts)
        if before is not None and not self._chooses(step.layer, step.before):
            choosing = [n != was for n, was in zip(step.lengths, before, strict=True)]  # after a cut
        if any(choosing):
            index = highest(step.of_visual(step.logits().mean(2)), counts)
            if not all(choosing):
                width = step.visual.shape[1]
                old = widened(choice_of["index"].to(index.device), max(width, choice_of["index"].shape[2]))[
                    :, :, :width
                ]
                index = packed(by_row(choosing, widened(index, width), old), counts)
            choice_of.update(lengths=step.lengths, index=index)
        if all(choosing):
            return None
        return with_whole_rows(step, choice_of["index"].to(step.keys.device), counts, choosing)

    def _chooses(self, layer: int, before: int) -> bool:
        """Whether `layer` chooses, if the stage last acted at layer `before` (-1: at none)."""
        return before < 0 or (self.correction is not None and before < self.correction <= layer)

    def _choosing(self, layer: int, acting: Sequence[int]) -> bool:
        at = acting.index(layer)
        return self._chooses(layer, acting[at - 1] if at else -1)

    def visual_read(self, layer: int, acting: Sequence[int], images: Sequence[int], step: int) -> int:
        return sum(images) if self._choosing(layer, acting) else self.budget(images)

    def read_to_choose(self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int], step: int) -> float:
        """All keys once more."""
        return (prompt + step + 1) / 2 if self._choosing(layer, acting) else 0
