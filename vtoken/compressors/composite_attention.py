"""Composite attention (experimental): in chosen layers visual tokens do not attend to each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from vtoken.reading import Prompt, Reads, SparseAttention

SIZE = 128


class CompositeAttention(SparseAttention):
    """In the chosen layers a visual token reads itself and the text in front of it; text reads everything before it, as ever.

    Softmax runs over exactly these keys. All tokens keep their projections, MLP, positions and place in the cache; what is saved is attention
    among visual tokens, quadratic in their number. `prefix: false` leaves a visual token itself alone, so that attention gives its own value.

    Paper: https://arxiv.org/abs/2408.11795
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2408.11795"
    deviations: ClassVar[str] = (
        "Experimental: an ablation after EE-MLLM and NAAViT (https://arxiv.org/abs/2502.02458), not a reproduction. Both train their models for it, "
        "and their full rules (which layers the training-free EE-MLLM-F takes, whether NAAViT's visual tokens read themselves) were not at hand. "
        "The default, the second half of the layers, is this project's. Neither method's saving on projections and MLP is made."
    )

    min_len: int = Field(default=0, ge=0, description="prompts of fewer tokens keep the model's own attention")
    at: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="decoder layers; none given: the second half of them"
    )
    prefix: bool = Field(default=True, description="visual tokens read the text in front of them too")

    def layers(self, depth: int) -> tuple[int, ...]:
        given = (
            range(depth // 2, depth) if self.at is None else (k % depth if -depth <= k < depth else k for k in self.at)
        )
        held = set(given)
        return tuple(k for k in super().layers(depth) if k in held)

    def reads(self, prompt: Prompt) -> Reads:
        text = prompt.image < 0
        tiles = -(-prompt.length // SIZE)
        blocks = torch.zeros(prompt.heads, tiles, tiles, dtype=torch.bool, device=text.device)
        columns = None
        if self.prefix:
            # Text first, in order, the rest marked as none: no count has to come from the device.
            order = torch.where(text, torch.arange(prompt.length, device=text.device), prompt.length).sort().values
            columns = torch.where(order < prompt.length, order, -1).int().expand(prompt.heads, 1, -1)
        dense = text.expand(prompt.heads, -1)
        return Reads(SIZE, blocks, columns, share=max(1, tiles), dense=dense, own=~text)
