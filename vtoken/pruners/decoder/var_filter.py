"""VAR's attention sinks: drop tokens whose hidden state has a massive channel, before another decoder stage chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from vtoken.stages import Keep, Site, Stage, VisualTokens, keep_where
from vtoken.stages.sinks import DIMS, massive, other_dims


class VarFilter(Stage):
    """Before decoder layer `layer`, drops the visual tokens whose hidden state, divided by its root mean square,
    exceeds `tau` in magnitude in one of the channels `dims`. If all tokens of an image are sinks, the weakest stays.
    How many are dropped (usually a handful) depends on the picture, so the plan counts none. Use it as a filter before
    a decoder-site pruner at the same or a later layer.

    Opt-in, because others found that sinks from the vision encoder carry what global questions need.

    Paper: https://arxiv.org/abs/2503.03321, which moves attention from sinks to other tokens and reports that masking
    them does no harm. The use as a filter is experimental.
    """

    site: ClassVar[Site] = "decoder"
    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.03321"
    deviations: ClassVar[str] = (
        "Drops sinks at one layer; the authors find them again at every layer and lower their attention. Without "
        "`dims` every channel counts."
    )

    layer: int = Field(
        default=2, ge=1, description="decoder layer before which sinks are dropped; the authors see none before 2"
    )
    tau: float = Field(default=20.0, gt=0, description="how many times the root mean square a channel must be")
    dims: tuple[int, ...] | None = Field(default=None, description=DIMS)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def incompatibility(self, depth: int, width: int) -> str:
        return other_dims(self.dims, depth, width)

    def select(self, tokens: VisualTokens) -> Keep:
        """Loops over images to find the token that stays even if all are sinks."""
        strength = massive(tokens.x, self.dims)
        stay = strength <= self.tau
        start = 0
        for n in tokens.lengths:
            if n:
                stay.index_fill_(0, start + strength[start : start + n].argmin()[None], True)
            start += n
        return keep_where(tokens, stay)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width
