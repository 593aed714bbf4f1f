"""VScan, stage 2: one cut in the middle of the LLM, to a third of the visual tokens that entered it."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens
from vtoken.stages.budget import Budget


class VScanLate(Pruner):
    """Before decoder layer `layer`, keeps in every image the tokens with the highest attention of the last prompt token
    in that layer: its norm and projections are applied to its input; softmax over everything the token sees, mean over
    heads.

    Used together with `vscan`: of three tokens that enter the LLM one is left in its second half, two on average; the
    published budgets are this average.

    Paper: https://arxiv.org/abs/2505.22654
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.22654"
    deviations: ClassVar[str] = (
        "Chooses image by image; the authors' code supports one image per prompt. Works with padding on either side "
        "and with grouped key heads."
    )

    keep: Budget = Field(default=Budget("33.34%"), description="tokens left after the cut; the authors keep a third")
    layer: int | None = Field(
        default=None,
        ge=1,
        description="first decoder layer that sees fewer tokens; null: the middle, the authors' 16 of 32 and 14 of 28",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("next_query_attention"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth // 2) if self.layer is None else self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("next_query_attention")
