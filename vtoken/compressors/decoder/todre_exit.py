"""ToDRE, stage 2: all visual tokens are dropped late in the LLM, where the text no longer attends to them."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field
from torch import Tensor

from vtoken.compressors.decoder._exits import asked, behind_all, leave, mass
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens


class ToDREExit(Compressor):
    """Acts before each of the decoder layers `at`. If in the layer before, the text after the images gave them less
    than `threshold` of its attention (softmax over everything a token sees, mean over these text tokens and the heads),
    all visual tokens of the row are dropped; otherwise all stay. The paper also measures how much the visual tokens
    attend to that text; under the causal mask they cannot, so that share is 0.

    How many rows exit depends on the prompt; the plan (FLOPs) counts on none. The authors found exits before 7/8 of the
    depth harmful: GQA falls from 64 to 60 at 3/4 and to 39 at 1/2. Stage 1 is the pruner `todre`. A prompt that ends
    with an image keeps it.

    Paper: https://arxiv.org/abs/2505.18757
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2505.18757"
    deviations: ClassVar[str] = (
        "No code to compare with. 'Layer 28 of 32' is read as the 28th, so that the first layer without visual tokens "
        "has index 28. Text is what comes after the last image of its row; attention to newline tokens of LLaVA-NeXT "
        "and OneVision does not count."
    )

    threshold: float = Field(
        default=0.1, gt=0, le=1, description="share of the text's attention below which images are dropped"
    )
    at: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="decoder layers before which the stage decides; null: one, at 7/8 of the depth",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("text_attention"), Fact("later_text"))

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth * 7 // 8),) if self.at is None else self.at

    def query_tokens(self, tokens: VisualTokens) -> list[Tensor]:
        return behind_all(tokens)

    def select(self, tokens: VisualTokens) -> Keep:
        low = (mass(tokens, tokens.fact("text_attention")) < self.threshold).tolist()
        return leave(tokens, [a and b for a, b in zip(asked(tokens), low, strict=True)])
