"""FitPrune: a calibrated table says how many visual tokens leave behind each layer of the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from vtoken.kernels import topk_tokens
from vtoken.stages import Fact, Keep, Parts, Site, Stage, VisualTokens, keep_all


class FitPrune(Stage):
    """Behind decoder layer l the table[l] visual tokens leave whose product of two attentions in that layer is lowest:
    of the text behind the image, and of the image's own tokens, each the maximum over heads and the mean over its
    queries. The leaving tokens stay in the cache of layer l. Without text behind the image the last tokens leave.

    The table is for images of `tokens` tokens that arrive whole. Of an image of another size, or pruned before, each
    layer takes the same share of what is there, rounded, but never its last token unless the table takes all. `vtoken
    calibrate fitprune MODEL` computes a table for a model and a budget.

    Paper: https://arxiv.org/abs/2409.10197. Reads the attention of all visual tokens in every layer behind which tokens
    leave.
    """

    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2409.10197"
    deviations: ClassVar[str] = (
        "Leaving tokens still pass the output projection and the MLP of the layer, which nothing reads. Image by "
        "image, where the authors' code takes all after the system prompt as one image of 576 tokens. Behind the last "
        "layer nothing leaves."
    )

    table: tuple[int, ...] = Field(
        min_length=1,
        description="tokens that leave behind each decoder layer, from layer 0 on; none behind layers that are not "
        "given",
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
        # A table for a deeper model names layers that do not exist, whatever its counts, and is refused.
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
        """Before a layer the table's count leaves; outside a model (None) the whole table."""
        alive = [self.tokens, *(self.tokens - gone for gone in accumulate(self.table))]
        before, after = (0, -1) if layer is None else (layer - 1, layer)
        held, left = alive[before], alive[after]
        if not left:
            return (0,) * len(lengths)
        # Rounded half up: a smaller image would lose a token too many at every layer otherwise.
        return tuple(min(n, max(1, (2 * n * left + held) // (2 * held))) for n in lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return sum(lengths)
