"""Attention sinks: tokens whose hidden state has a massive channel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Channels in which sinks appear -> the LLM, its number of layers and of channels.
PUBLISHED: dict[tuple[int, ...], tuple[str, int, int]] = {
    (1415, 2533): ("LLaMA-2-7B", 32, 4096),
    (2100, 4743): ("LLaMA-2-13B", 40, 5120),
}
DIMS = (
    "channels of the LLM in which sinks appear: [1415, 2533] for LLaMA-2-7B (LLaVA-1.5-7B), [2100, 4743] for 13B, "
    "refused on LLMs of other sizes; null: all"
)


def other_dims(dims: Sequence[int] | None, depth: int, width: int) -> str:
    """Why sinks do not show in these channels of an LLM with `depth` layers and `width` channels; "" if they may."""
    wrong = [d for d in dims or () if not 0 <= d < width]
    llm, *own = PUBLISHED.get(tuple(sorted(dims or ())), ("another LLM", depth, width))
    if not wrong and own == [depth, width]:
        return ""
    return (
        f"sinks show in channels {list(dims or ())} of {llm}, not in those of this LLM ({depth} layers, "
        f"{width} channels); leave dims out to look at all channels, or give those of this LLM"
    )


def massive(x: Tensor, dims: Sequence[int] | None) -> Tensor:
    """[...] largest |channel| among `dims` (None: all) of x [..., D], divided by the root mean square of all."""
    x = x.float()
    chosen = x if dims is None else x[..., list(dims)]
    return chosen.abs().amax(-1) * (x.square().mean(-1) + 1e-6).rsqrt()
