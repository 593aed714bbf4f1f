"""VTW: all visual tokens are dropped at one decoder layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field

from vtoken.stages import Compressor, Keep, Parts, Site, VisualTokens


class VTW(Compressor):
    """Before decoder layer `layer`, drops every visual token: deeper layers compute, and cache, text only. The
    information of the image must have reached the text by then: too aggressive for reading text in images and for long
    captions.

    The authors choose the layer offline, as `vtoken calibrate vtw` does for a model: the first from 5 on at which the
    next-token distribution on some 20 samples stays close to the unpruned one (KL(withdrawn || full) at most 0.003;
    0.0005 for 13B): layer 15 of 32 for LLaVA-1.5-7B.

    Paper: https://arxiv.org/abs/2405.05803
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.05803"
    deviations: ClassVar[str] = (
        "Without `layer`, the authors' result for LLaVA-1.5-7B is used, in proportion to the depth; `vtoken calibrate "
        "vtw` searches for it."
    )

    layer: int | None = Field(
        default=None, ge=1, description="first decoder layer without visual tokens; null: 15 of every 32 layers"
    )

    def layers(self, depth: int) -> tuple[int, ...]:
        return (max(1, depth * 15 // 32) if self.layer is None else self.layer,)

    def select(self, tokens: VisualTokens) -> Keep:
        return Keep(tokens.raster_index.new_zeros(0), (0,) * len(tokens.lengths))

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        return (0,) * len(lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return True
