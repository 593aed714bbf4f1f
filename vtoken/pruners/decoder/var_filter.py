"""VAR's attention sinks: drop tokens whose hidden state has a massive channel, before another decoder stage chooses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.stages import Keep, Site, Stage, VisualTokens, keep_all

# Channels in which sinks appear -> the LLM, its number of layers and of channels.
PUBLISHED: dict[tuple[int, ...], tuple[str, int, int]] = {
    (1415, 2533): ("LLaMA-2-7B", 32, 4096),
    (2100, 4743): ("LLaMA-2-13B", 40, 5120),
}


class VarFilter(Stage):
    """Before decoder layer `layer`, drops the visual tokens whose hidden state, divided by its root mean square,
    exceeds `tau` in one of the channels `dims`. If all tokens of an image are sinks, the weakest stays. How many are
    dropped (usually a handful) depends on the picture, so the plan counts none. Use it as a filter before a
    decoder-site pruner at the same or a later layer.

    Opt-in: others found that sinks which stem from the vision encoder carry what global questions need.

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
    dims: tuple[int, ...] | None = Field(
        default=None,
        description="channels of the LLM in which sinks appear: [1415, 2533] for LLaMA-2-7B (LLaVA-1.5-7B), [2100, "
        "4743] for 13B, refused on LLMs of other sizes; null: all",
    )

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def incompatibility(self, depth: int, width: int) -> str:
        wrong = [d for d in self.dims or () if not 0 <= d < width]
        llm, *own = PUBLISHED.get(tuple(sorted(self.dims or ())), ("another LLM", depth, width))
        if not wrong and own == [depth, width]:
            return ""
        return (
            f"sinks show in channels {list(self.dims or ())} of {llm}, not in those of this LLM ({depth} layers, "
            f"{width} channels); leave dims out to look at all channels, or give those of this LLM"
        )

    def select(self, tokens: VisualTokens) -> Keep:
        """Loops over images to find the token that stays even if all are sinks."""
        strength = massive(tokens.x, self.dims)
        stay = strength <= self.tau
        start = 0
        for n in tokens.lengths:
            if n:
                stay.index_fill_(0, start + strength[start : start + n].argmin()[None], True)
            start += n
        lengths = tuple(torch.stack([s.sum() for s in stay.split(tokens.lengths)]).tolist())
        return keep_all(tokens) if lengths == tokens.lengths else Keep(stay.nonzero()[:, 0], lengths)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        return 2 * sum(lengths) * width


def massive(x: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """[N] largest |channel| among `dims` (None: all) of x [N, D], divided by the row's root mean square."""
    x = x.float()
    chosen = x if dims is None else x[:, list(dims)]
    return chosen.abs().amax(1) * (x.square().mean(1) + 1e-6).rsqrt()
