"""TransPrune: keep the tokens that the LLM's layers change most and that the text is about to attend to."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens, image_of


class TransPrune(Pruner):
    """Before decoder layer `layer`, keeps the tokens with the largest sum of two scores, each divided by its sum over
    the image's tokens.

    Transition: summed over the attention and the MLP of layers `first` to `layer` - 1, the norm of the block's output
    (without the residual) over that of its input (after the layer's norm), times the token's share of exp(1 - cosine
    of the two) among all tokens of the row, text included.

    Attention: that of the text after the image in the layer about to run, whose norm and projections are applied to
    its input; softmax over all that a token sees, mean over heads and text.

    This is one cut; the published schedule is three such stages, see the presets.

    Paper: https://arxiv.org/abs/2507.20630
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2507.20630"
    deviations: ClassVar[str] = (
        "Each cut takes its share of the tokens that arrive, rounded to the nearest; the authors take it of the "
        "unpruned count, rounded down: the counts may differ by a token. Shares are of a row and computed in float32; "
        "the authors' are of the whole batch. Any batch, several images and any padding work, image by image; the "
        "authors' code takes one image and one row."
    )

    layer: int | None = Field(
        default=None,
        ge=1,
        description="first decoder layer that sees fewer tokens; null: 7 of 32, in proportion. The authors cut before "
        "7, 9 and 12",
    )
    first: int | None = Field(
        default=None,
        ge=0,
        description="first layer whose transitions count; null: the one before the cut. The authors' is 6",
    )

    def needs(self) -> tuple[Fact, ...]:
        return Fact("transition", self.first), Fact("next_text_attention")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth * 7 // 32) if self.layer is None else self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        facts = torch.stack([tokens.facts[need].float() for need in self.needs()])
        image = image_of(tokens.lengths, facts.device)
        total = facts.new_zeros(2, len(tokens.lengths)).index_add_(1, image, facts)
        return (facts / (total[:, image] + 1e-8)).sum(0)
