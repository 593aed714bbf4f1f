"""FlowCut, second stage: one cut after the LLM's second layer, by how much information flows from each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens


class FlowCutLate(Pruner):
    """Before decoder layer `layer`, scores tokens by (attention + relevance) * density, all in the layer before.
    Attention is that of the last prompt token, softmax over the image's tokens only, averaged over heads. Relevance is
    the same with values for query and keys. Density is the L1 norm of the token's head-mean value. The tokens with the
    highest scores stay.

    Used together with `flowcut` on pictures cut into crops: the authors let half of the total budget per crop into the
    LLM, and cut to the total (`keep: {total: 640}`) after its second layer. Their Qwen variant lets twice the budget
    in.

    Paper: https://arxiv.org/abs/2505.19536
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19536"
    deviations: ClassVar[str] = (
        "Each image of a prompt is scored among its own tokens, and a total budget is divided in proportion to their "
        "sizes; the authors' code takes all images of a prompt as one. Any padding works; the authors' code pads on "
        "the right."
    )

    layer: int = Field(
        default=2,
        ge=1,
        description="first decoder layer that sees fewer tokens; the authors read layer 1 and cut after it",
    )

    def needs(self) -> tuple[Fact, ...]:
        return Fact("visual_attention"), Fact("visual_value_attention"), Fact("mean_value")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        flow = tokens.fact("visual_attention") + tokens.fact("visual_value_attention")
        return flow * tokens.fact("mean_value").float().abs().sum(-1)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Head mean and norm of the values, each at most as wide as the LLM."""
        return sum(lengths) * width
