"""PyramidKV: SnapKV with more slots in early decoder layers than in late ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from vtoken.compressors.cache.snapkv import SnapKV
from vtoken.stages.layer_size import LayerSize


class PyramidKV(SnapKV):
    """Chooses as `snapkv` does. The number of tokens falls linearly from the first layer that attends to the last one,
    which keeps a `beta`-th of the mean; all layers together hold as much as with `snapkv`. Where the first layers would
    be given more than there is, they keep all, and the slope is flatter.

    Paper: https://arxiv.org/abs/2406.02069
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2406.02069"
    deviations: ClassVar[str] = (
        "As snapkv. The sum over layers is exact, where the authors' code rounds the step between two layers down, and "
        "the window's slots are part of the budget in every layer. The last layer keeps at least one token of each "
        "image. The kernel is 5, as in the code."
    )

    beta: int = Field(default=20, ge=1, description="how many times fewer tokens than the mean the last layer keeps")

    def left(self, prompt: int, lengths: Sequence[int], place: tuple[int, int] | None = None) -> tuple[int, ...]:
        mean = super().left(prompt, lengths)
        if place is None:
            return mean
        if not self.text:
            return tuple(narrowed(k, n, self.beta, *place) for k, n in zip(mean, lengths, strict=True))
        window = min(self.window, mean[0])
        return (window + narrowed(mean[0] - window, prompt - window, self.beta, *place),)

    def cache_slots(self, at: LayerSize) -> float:
        left = sum(self.left(at.prompt, at.images, at.place))
        return left + (0 if self.text else at.prompt - sum(at.images)) + at.generated


def narrowed(mean: int, tokens: int, beta: int, before: int, layers: int) -> int:
    """How many of `tokens` a layer keeps, if `before` of the `layers` layers come before it; `mean` on average over all
    layers. What a layer keeps beyond the mean, the layer as far from the other end keeps less."""
    if 2 * before == layers - 1:
        return mean
    if 2 * before > layers - 1:
        return 2 * mean - narrowed(mean, tokens, beta, layers - 1 - before, layers)
    least = max(min(mean, max(1, mean // beta)), 2 * mean - tokens)
    most = 2 * mean - least
    return most - (most - least) * before // (layers - 1)
