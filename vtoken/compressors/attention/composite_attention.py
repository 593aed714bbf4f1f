"""Composite attention (experimental): in chosen layers visual tokens do not attend to each other."""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field

from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask

SIZE = 128


class CompositeAttention(SparseAttention):
    """In the chosen layers, a visual token reads only itself and the text before it; text reads everything before it,
    as usual.

    The softmax runs over exactly these keys. All tokens keep their projections, MLP, positions and place in the cache;
    what is saved is the attention among visual tokens, which is quadratic in their number. With `prefix: false`, a
    visual token reads only itself, so its attention output is its own value. With `prefix`, one number per prefill and
    row is fetched from the device.

    Paper: https://arxiv.org/abs/2408.11795
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2408.11795"
    deviations: ClassVar[str] = (
        "Experimental: an ablation after EE-MLLM and NAAViT (https://arxiv.org/abs/2502.02458), not a reproduction. "
        "Both train their models for it, and their full rules (which layers the training-free EE-MLLM-F takes, whether "
        "NAAViT's visual tokens read themselves) were not available. The default, the second half of the layers, is "
        "this project's. Neither method's saving on projections and MLP is implemented."
    )

    keeps_apart: ClassVar[bool] = True

    min_len: int = Field(default=0, ge=0, description="prompts of fewer tokens keep the model's own attention")
    first: int | None = Field(default=None, ge=0, description="first decoder layer it acts in; null: half of the depth")
    prefix: bool = Field(default=True, description="visual tokens read the text before them too")

    def layers(self, depth: int) -> tuple[int, ...]:
        first = depth // 2 if self.first is None else self.first
        return tuple(k for k in super().layers(depth) if k >= first)

    def reads(self, prompt: PrefillQK) -> SparseMask:
        text = prompt.image < 0
        tiles = -(-prompt.length // SIZE)
        blocks = torch.zeros(prompt.heads, tiles, tiles, dtype=torch.bool, device=text.device)
        listed = prompt.once("text", lambda: text.nonzero()[:, 0].int()) if self.prefix else text.new_empty(0)
        columns = listed.expand(prompt.heads, 1, -1) if len(listed) else None
        dense = text.expand(prompt.heads, -1)
        return SparseMask(SIZE, blocks, columns, share=max(1, tiles), dense=dense, own=~text)
