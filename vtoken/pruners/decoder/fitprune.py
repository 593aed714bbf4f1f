"""FitPrune: a calibrated table says how many visual tokens are dropped after each layer of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.stages import Fact, Keep, Parts, Site, Stage, VisualTokens, keep_all


class FitPrune(Stage):
    """After decoder layer l, drops the table[l] visual tokens with the lowest product of two attentions received in
    that layer: from the text after the image, and from the image's own tokens; each is the maximum over heads, averaged
    over its queries. Dropped tokens stay in the cache of layer l. Without text after the image, the last tokens are
    dropped.

    The table is made for images of `tokens` tokens that arrive unpruned. In an image of another size, or pruned before,
    each layer drops the same share of the tokens present, rounded, but never the last remaining token unless the table
    drops all. `vtoken calibrate fitprune MODEL` computes a table for a model and a budget.

    Paper: https://arxiv.org/abs/2409.10197. Reads the attention of all visual tokens in every layer after which tokens
    are dropped.
    """

    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10197"
    deviations: ClassVar[str] = (
        "Dropped tokens still pass the output projection and the MLP of the layer, though nothing reads the result. "
        "Image by image, where the authors' code takes all after the system prompt as one image of 576 tokens. After "
        "the last layer nothing is dropped."
    )

    table: tuple[int, ...] = Field(
        min_length=1,
        description="tokens dropped after each decoder layer, from layer 0 on; none after layers that are not given",
    )
    tokens: int = Field(default=576, ge=1, description="visual tokens of the images that the table was made for")

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if min(self.table) < 0 or sum(self.table) > self.tokens:
            raise ValueError(
                f"table must hold counts from 0 on that add up to at most `tokens`, {self.tokens}; these add up to "
                f"{sum(self.table)}"
            )
        return self

    def needs(self) -> tuple[Fact, ...]:
        return Fact("cross_attention"), Fact("self_attention")

    def layers(self, depth: int) -> tuple[int, ...]:
        # Entries past the last layer are named even if they drop nothing, so that a table of a deeper model is refused.
        return tuple(k + 1 for k, n in enumerate(self.table) if (n and k + 1 != depth) or k >= depth)

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.expected_counts(tokens.lengths, tokens.parts, tokens.row, tokens.layer)
        if counts == tokens.lengths:
            return keep_all(tokens)
        product: Tensor = tokens.fact("cross_attention").float() * tokens.fact("self_attention").float()
        return Keep(topk_tokens(product, tokens.offsets, list(counts)), counts)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        """What is left before this layer; outside a model (None), what the whole table leaves."""
        alive = [self.tokens, *(self.tokens - gone for gone in accumulate(self.table))]
        before, after = (0, -1) if layer is None else (layer - 1, layer)
        sizes, left = alive[before], alive[after]
        if not left:
            return (0,) * len(lengths)
        # Rounded half up; otherwise a smaller image would lose one token too many at every layer.
        return tuple(min(n, max(1, (2 * n * left + sizes) // (2 * sizes))) for n in lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(lengths)
