"""PyramidDrop: several cuts in the LLM, each keeping half of the visual tokens that are left."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens
from vtoken.stages.budget import Budget


class PyramidDrop(Pruner):
    """Before each of the decoder layers `at`, keeps the tokens with the highest attention of the last prompt token in
    the layer about to run: that layer's norm and projections are applied to its input; softmax over everything the
    token sees, mean over heads.

    `keep` is what one cut keeps of the tokens that arrive at it: 50% gives the authors' 1/2, 1/4, 1/8 of the image's
    tokens, an average of 47% over all layers. Use several such stages, each with its own `at`, for ratios that differ
    between cuts.

    Paper: https://arxiv.org/abs/2410.17247
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.17247"
    deviations: ClassVar[str] = (
        "Each cut takes its share of the tokens that arrive, rounded to the nearest; the authors take it of the "
        "unpruned count, rounded down: the counts may differ by a token. Works with several images, image by image, "
        "with left padding and with grouped key heads, where the authors' code does not."
    )

    keep: Budget = Field(default=Budget("50%"), description="tokens left after each cut, of those that arrive at it")
    at: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="decoder layers before which tokens are dropped; null: at one, two and three quarters of the "
        "depth, the authors' 8, 16 and 24 of 32",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("next_query_attention"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(sorted({max(1, depth * q // 4) for q in (1, 2, 3)})) if self.at is None else self.at

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("next_query_attention")
