"""IPCV: run a vision tower on the patches that change most, and estimate the others after it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field, field_validator
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens
from vtoken.stages.budget import Budget


class IPCV(Pruner):
    """Before encoder layer `layer`, keeps the patches of an image that the layer before changed most, by the norm of
    the difference. For every other patch its `neighbours` nearest kept patches are found then (Euclidean distance). At
    any later layer, it is estimated as its value at the cut plus their mean change since the cut.

    In the next `stabilised` layers attention runs on all patches, estimates among them, and the MLP on the kept ones;
    later layers run on the kept ones alone. Where features are read, and at DeepStack's taps, estimates fill the gaps,
    so the number of visual tokens stays what it was and any stage of site tokens may follow. Saves FLOPs of the tower
    only.

    Paper: https://arxiv.org/abs/2512.18747. Loops over images to find neighbours, then over neighbours.
    """

    site: ClassVar[Site] = "encoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2512.18747"
    deviations: ClassVar[str] = (
        "Patches are ranked and find their neighbours within their own image, or crop; the authors' code ranks all "
        "images of a call together. Frames are counted exactly; theirs counts the first patch of a frame to the one "
        "before. The share is rounded to the nearest patch, theirs down. At Qwen2.5-VL's windows and Qwen3-VL's taps "
        "the same rule holds, which the authors do not run."
    )

    keep: Budget = Field(default=Budget("35%"), description="patches that stay: a count per image or crop, or a share")
    layer: int | None = Field(
        default=None,
        ge=1,
        description="first encoder layer with fewer patches; null: 3 of 32, in proportion. The authors take 3 on "
        "Qwen2-VL and 7 of 24 on InternVL2",
    )
    neighbours: int = Field(default=10, ge=1, description="kept patches that a dropped one follows")
    stabilised: int = Field(
        default=7,
        ge=0,
        description="layers in which attention still runs on all patches; the authors take 7 on Qwen2-VL, 3 on "
        "InternVL2",
    )

    @field_validator("keep")
    @classmethod
    def _of_pictures(cls, keep: Budget) -> Budget:
        return keep.of_each("patches per picture (400)")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("change"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth * 3 // 32 if self.layer is None else self.layer) - 1,)

    def refills(self) -> tuple[int, int]:
        return self.neighbours, self.stabilised

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("change")

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Distances between dropped and kept patches."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * (n - k) * k * width for n, k in zip(lengths, counts, strict=True))
