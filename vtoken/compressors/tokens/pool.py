"""Pool: k x k average pooling, the baseline for merging."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from vtoken.compressors._cells import cells_in, pooled
from vtoken.stages import Compressor, Keep, Parts, Site, VisualTokens


class Pool(Compressor):
    """Averages every `size` x `size` cell of each frame (of each raster of an anyres image) into one token; cells at
    the edge average the tokens they have. The merged token takes the place (and position) of the cell's first token in
    reading order. Tokens that an earlier stage dropped are left out of the mean.

    No paper: a baseline.
    """

    site: ClassVar[Site] = "tokens"
    paper: ClassVar[str] = "no paper"

    size: int = Field(default=2, ge=1, description="side of the pooled cell, in tokens")

    def select(self, tokens: VisualTokens) -> Keep:
        return pooled(tokens, [self.size] * len(tokens.lengths))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(min(n, cells_in(image, self.size)) for n, image in zip(lengths, parts, strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return whole

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width
