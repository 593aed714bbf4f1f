"""FastV: drop the visual tokens that the last prompt token barely attends to, early in the LLM."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens
from vtoken.stages.budget import Budget


class FastV(Pruner):
    """Before decoder layer K, keeps in every image the tokens with the highest attention of the last prompt token in
    layer K - 1: softmax over everything that token sees, mean over heads. Decided once, at prefill.

    Layers before K still see all tokens: for an average of A over all L layers, keep (A L - K N) / (L - K) of N. The
    last token's attention favours nearby tokens, which are the lower part of an image.

    Paper: https://arxiv.org/abs/2403.06764
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2403.06764"
    deviations: ClassVar[str] = (
        "Chooses image by image; the authors' code supports one image per prompt. Its version without a KV cache "
        "chooses again at every step, the one with a cache runs layer K - 1 twice; here the layer runs once and its "
        "keys are cached once."
    )

    keep: Budget = Field(default=Budget("50%"), description="tokens left after the cut; the authors drop half")
    layer: int = Field(default=2, ge=1, description="K, the first decoder layer that sees fewer tokens")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("last_query_attention"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("last_query_attention")
