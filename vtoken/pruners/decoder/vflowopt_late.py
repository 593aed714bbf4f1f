"""VFlowOpt, stages 2 and 3: cuts inside the LLM that follow the vision encoder's importance map."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens
from vtoken.stages.budget import Budget


class VFlowOptLate(Pruner):
    """Before decoder layer `layer`, keeps the tokens with the highest importance, the same that `vflowopt` ranks by
    (give both the same `threshold`): attention received in the vision encoder's feature layer, averaged over the
    queries that themselves receive more than `threshold` times the mean of their crop. Nothing is read from the LLM. A
    recycled token has the importance of the token whose place it took. This stage recycles nothing.

    One cut; the authors make two, each taking its share of the tokens that arrive: before layers 9 and 18 of 28
    (LLaVA-OneVision) or 10 and 20 of 32.

    Paper: https://arxiv.org/abs/2508.05211
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.05211"
    deviations: ClassVar[str] = (
        "The importance does not include the patch entropy, which is off in all released settings. Shares are of the "
        "image's tokens; the authors count newlines too, which they never drop (newline: keep)."
    )

    keep: Budget = Field(description="tokens left after the cut, of those that arrive at it")
    layer: int | None = Field(
        default=None, ge=1, description="first decoder layer that sees fewer tokens; null: 9 of every 28 layers"
    )
    threshold: float = Field(
        default=34.76,
        ge=0,
        description="received attention, in means of the crop, above which a query counts; 0: all count",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("received_attention", above=self.threshold),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth * 9 // 28) if self.layer is None else self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("received_attention", above=self.threshold).float()
