"""SeerAttention: trained gates predict, from pooled queries and keys, which key blocks each head reads."""

from __future__ import annotations

from functools import cached_property
from typing import ClassVar

import torch
from pydantic import Field, field_validator

from vtoken.compressors._files import Weights
from vtoken.compressors.attention._seer import Header, chosen, header, logits, matrices, pooled, read
from vtoken.stages import NAMES_FILE
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask


class SeerAttention(SparseAttention):
    """In every layer, queries and keys before RoPE are pooled over blocks: queries by their mean, keys by maximum,
    minimum and mean side by side, which a matrix per query head projects back to the width of a head. Both are rotated
    by the position at which their block starts. The softmax of their products over the causal key blocks predicts how
    much of a query block's attention each key block gets. Blocks with more than `threshold` are read, or with `share`
    as many of the largest as make up that share of the causal map. The first block and the diagonal are always read,
    and the last `last` query blocks read everything.

    The gates are trained on the model's own attention, which stays unchanged: `vtoken calibrate seerattention MODEL
    --data DATA -o FILE`. The file says how large blocks are. The authors' attn_gate_weights.pth can be read too; the
    published ones are for text models (Llama-3.1, Qwen2.5), not for VLMs built on them.

    Paper: https://arxiv.org/abs/2410.13276
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2410.13276"
    deviations: ClassVar[str] = (
        "One matrix per query head, on pooled keys, as in the authors' default and published gates; their variants (a "
        "matrix for queries too, one per key head, other poolings, a gate width other than the head's) are left out. "
        "The first block and the diagonal are always read; the authors read them where their gate says so. Queries and "
        "keys are rotated back from what the model rotated, exact up to rounding. With M-RoPE, and after pruning, a "
        "block starts at the positions of its first token, a case that the paper does not cover. Blocks are counted "
        "from a row's first token, without its padding. `share` breaks ties towards the first block."
    )
    rope: ClassVar[bool] = True

    gates: str = Field(
        description="file that `vtoken calibrate seerattention` wrote for the same model, or the authors' "
        "attn_gate_weights.pth",
        json_schema_extra=NAMES_FILE,
    )
    threshold: float = Field(
        default=2e-3,
        ge=0,
        lt=1,
        description="share of a query block's attention above which a key block is read; useful: 5e-4 to 5e-3",
    )
    share: float | None = Field(
        default=None, gt=0, le=1, description="share of the causal blocks that is read, instead of a threshold"
    )
    last: int = Field(default=2, ge=0, description="query blocks at the end that read everything")

    @field_validator("gates")
    @classmethod
    def _readable(cls, gates: str) -> str:
        read(gates)
        return gates

    @cached_property
    def header(self) -> Header:
        """The header of the file, as it was when first read."""
        return header(self.gates)

    @cached_property
    def weights(self) -> Weights:
        """The gates, [H, 3 d, d] of every layer."""
        return Weights({layer: (gate,) for layer, gate in enumerate(matrices(self.gates))})

    def unload(self) -> None:
        self.weights.unload()

    def incompatibility(self, depth: int, width: int) -> str:
        header, _ = self.header, self.weights  # read when wrapping
        return "" if header.depth == depth else self._other(header, f"{depth} layers")

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        header = self.header
        if (header.heads, header.key_heads or key_heads, header.width) != (heads, key_heads, width):
            return self._other(header, f"{heads} query heads on {key_heads} key heads of width {width}")
        return ""

    def _other(self, header: Header, here: str) -> str:
        on = f" on {header.key_heads} key heads" if header.key_heads else ""
        return (
            f"the gates {self.gates!r} are for {header.depth} layers of {header.heads} query heads{on} of width "
            f"{header.width}, this model has {here}; train gates for it: vtoken calibrate seerattention MODEL --data "
            "DATA -o FILE"
        )

    def reads(self, prompt: PrefillQK) -> SparseMask:
        assert prompt.rope is not None
        size = self.header.size
        starts, (gates,) = prompt.rope.starts(size), self.weights.on(prompt.layer, prompt.q.device)
        groups, blocks = prompt.heads // len(prompt.k), []
        queries, keys = pooled(prompt, size)
        for q, k, matrix in zip(queries.split(groups), keys.split(1), gates.split(groups), strict=True):
            shares = logits(q, k, matrix, starts).softmax(-1)
            blocks.append(chosen(shares, self.threshold, self.share, self.last))
        return SparseMask(size, torch.cat(blocks))
