"""ToMe: merge similar tokens in every layer of the vision encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar, Self

from pydantic import Field
from torch import Tensor

from vtoken.compressors._matching import Merger
from vtoken.stages import Parts

Merges = Annotated[int, Field(ge=0)]


class ToMe(Merger):
    """Between attention and MLP of each layer, the tokens of a picture are dealt alternately to two sides. Each token
    of side A finds its most similar token of side B (cosine of this layer's keys, averaged over heads); the r most
    similar pairs become their mean, weighted by the number of patches that each represents. CLS never merges. Later
    layers run on r fewer tokens, and count a merged token once per member in attention (log of their number is added to
    the logits).

    The decoder gets a merged token at the place of the member of side B. Layers after the feature layer are left
    unchanged: LLaVA-1.5 reads the last but one, so r = 21 leaves 576 - 23 * 21 = 93. All pictures of a batch lose the
    same number. Not for Qwen, whose encoder joins 2 x 2 patches (see dtome_post), nor where OneVision interpolates
    features.

    Paper: https://arxiv.org/abs/2210.09461
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2210.09461"
    deviations: ClassVar[str] = (
        "The order in which tokens are dealt out is the authors', but tokens stay in reading order, so the decoder "
        "sees them where they belong. Distillation tokens, tracing of sources as a matrix, and the paper's other ways "
        "to split tokens between the sides are left out."
    )

    r: Merges | tuple[Merges, ...] = Field(
        description="merges in every layer, or a list with one number per layer; missing ones are 0"
    )
    inflection: float = Field(
        default=0,
        ge=-1,
        le=1,
        description="with one r: layer 0 merges r (1 - i), the last r (1 + i), linear in between",
    )

    def schedule(self, depth: int) -> tuple[int, ...]:
        """Number of merges in every layer of an encoder."""
        if isinstance(self.r, tuple):
            return (*self.r[:depth], *[0] * (depth - len(self.r)))
        least = int(self.r * (1 - self.inflection))
        step = 2 * (self.r - least) / max(1, depth - 1)
        return tuple(int(least + i * step) for i in range(depth))

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(layer for layer, r in enumerate(self.schedule(depth)) if r > 0)

    def for_depth(self, depth: int) -> Self:
        return self.model_copy(update={"r": self.schedule(depth), "inflection": 0})

    def _most(self, lengths: Sequence[int], layer: int) -> tuple[int, ...]:
        r = self.schedule(layer + 1)[layer] if isinstance(self.r, tuple) else self.r
        return tuple(min(r, n // 2) for n in lengths)

    def taken(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        return self._most(lengths, at)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return tuple(n - r for n, r in zip(lengths, self._most(lengths, layer or 0), strict=True))

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True
