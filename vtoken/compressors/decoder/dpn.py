"""DPN's pyramid without its routers: visual tokens are pooled repeatedly inside the LLM."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from pydantic import Field, model_validator

from vtoken.compressors._cells import cells_in, pooled
from vtoken.stages import Compressor, Keep, Parts, Site, VisualTokens, keep_all

QUARTERS = (1, 2, 3)


class DPN(Compressor):
    """Before each of the decoder layers `at`, averages the visual tokens of every k x k cell of the current grid, where
    k is the layer's entry in `sizes`. The mean takes the place (and position) of the cell's first token. Cells at the
    edge average the tokens they have. An image whose grid has fewer than `least` tokens, or a raster smaller than k x
    k, stays unchanged.

    The schedule is fixed by hand. The authors train a router per layer that picks k in {1, 2, 4} (the last: {1, 2}) for
    each question, and fine-tune the LLM with it.

    Paper: https://arxiv.org/abs/2503.20322
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.20322"
    deviations: ClassVar[str] = (
        "A static schedule, not the authors' method: without routers nothing is chosen by the question, and pooled "
        "tokens are not multiplied by the router's probability, which a stock LLM was not trained for. Means instead "
        "of maxima, original positions instead of renumbered ones (positions: compact has these), edges are kept. With "
        "routers: dpn_routed."
    )

    at: tuple[int, ...] | None = Field(
        default=None,
        min_length=1,
        description="decoder layers before which tokens are pooled; null: one, two and three quarters of the depth, "
        "the authors' 8, 16, 24 of 32",
    )
    sizes: tuple[int, ...] = Field(
        default=(2, 1, 2),
        min_length=1,
        description="side of the cells at each of these layers, in tokens of the current grid; a guess",
    )
    least: int = Field(default=16, ge=1, description="images with fewer tokens stay unchanged, as in the authors' code")

    @model_validator(mode="after")
    def _one_each(self) -> Self:
        at = () if self.at is None else self.at
        if min(self.sizes) < 1 or list(at) != sorted(set(at)) or len(at) not in (0, len(self.sizes)):
            raise ValueError("`at` must name ascending layers, and `sizes` a number from 1 on for each of them")
        if self.at is None and len(self.sizes) != len(QUARTERS):
            raise ValueError(f"`sizes` without `at` must be {len(QUARTERS)} numbers, one for each quarter of the depth")
        return self

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(max(1, depth * q // 4) for q in QUARTERS) if self.at is None else self.at

    def for_depth(self, depth: int) -> Self:
        """The stage adapted to a decoder of `depth` layers; `select` and `expected_counts` need to know which of the
        sizes applies."""
        return self.model_copy(update={"at": self.layers(depth)})

    def select(self, tokens: VisualTokens) -> Keep:
        before, after = zip(*(self._sides(parts, tokens.layer) for parts in tokens.parts), strict=True)
        return keep_all(tokens) if before == after else pooled(tokens, after)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        sides = [self._sides(image, layer) for image in parts]
        cells = [
            n if old == new else cells_in(image, new)
            for n, image, (old, new) in zip(lengths, parts, sides, strict=True)
        ]
        return tuple(min(n, c) for n, c in zip(lengths, cells, strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return whole

    def _sides(self, parts: Parts, layer: int | None) -> tuple[int, int]:
        """Side of an image's cells, in tokens of its unpruned raster, before and after the layer (None: before and
        after all of them)."""
        if layer is not None and self.at is None:
            raise ValueError("dpn does not know how deep the decoder is; use what its for_depth(depth) returns")
        sizes = self.sizes if layer is None else self.sizes[: (self.at or ()).index(layer) + 1]
        sides = [1]
        for k in sizes:
            side = sides[-1]
            grids = [(-(-h // side), -(-w // side)) for _, h, w in parts]
            fits = cells_in(parts, side) >= self.least and all(min(grid) >= k for grid in grids)
            sides.append(side * k if fits else side)
        return sides[0 if layer is None else -2], sides[-1]

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width
