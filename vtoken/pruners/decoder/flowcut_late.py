"""FlowCut, second stage: one cut behind the LLM's second layer, by how much information flows from each token to the question."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens


class FlowCutLate(Pruner):
    """Before decoder layer `layer` a token scores (attention + relevance) * density, all of the layer before.
    Attention: of the last prompt token, softmax over the image's tokens alone, head mean. Relevance: the same with
    values for query and keys. Density: L1 norm of the head mean of the token's value. The best stay.

    Goes with `flowcut` on pictures cut into crops: the authors let half of the total budget per crop into the LLM, and
    cut to the total (`keep: {total: 640}`) behind its second layer. Qwen's variant lets twice the budget in.

    Paper: https://arxiv.org/abs/2505.19536
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.19536"
    deviations: ClassVar[str] = (
        "Of several images in a prompt each is scored among its own tokens, and a total budget is shared out by their "
        "sizes; the authors' code takes all images of a prompt as one. Any padding; the authors' code pads on the "
        "right."
    )

    layer: int = Field(
        default=2,
        ge=1,
        description="first decoder layer that sees fewer tokens; the authors read layer 1 and cut behind it",
    )

    def needs(self) -> tuple[Fact, ...]:
        return Fact("visual_attention"), Fact("visual_value_attention"), Fact("mean_value")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        flow = tokens.fact("visual_attention") + tokens.fact("visual_value_attention")
        return flow * tokens.fact("mean_value").float().abs().sum(-1)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Head mean and norm of the values; at most the width of the LLM each."""
        return sum(lengths) * width
