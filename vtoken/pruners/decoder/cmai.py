"""CMAI's focus score (experimental): keep visual tokens that matter to text which matters to other text."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.stages import Fact, Pruner, Site, VisualTokens


class CMAI(Pruner):
    """Before decoder layer `layer`, keeps the tokens with the highest focus. The focus is the column sums of A_tt A_ti:
    A_tt is the attention of the text after the image to itself, A_ti its attention to the image, both in the layer
    before, averaged over heads. Text that other text attends to thus weighs more than in a plain sum over rows. Without
    text after the image, the first tokens stay.

    Experimental: only the abstract of the paper could be read. The two factors are the authors'. The product, the sum
    over the text, the choice of layer and the use for dropping tokens are this project's. The authors inhibit attention
    between text and image instead, and drop nothing.

    Paper: https://arxiv.org/abs/2411.15453. Loops over images.
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2411.15453"
    deviations: ClassVar[str] = (
        "A reconstruction, not the authors' method: theirs masks attention of pairs with low focus, in layers that the "
        "abstract does not name."
    )

    layer: int = Field(default=2, ge=1, description="first decoder layer that sees fewer tokens; a guess")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("relayed_attention"),)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def score(self, tokens: VisualTokens) -> Tensor:
        return tokens.fact("relayed_attention")
