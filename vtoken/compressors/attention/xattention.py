"""XAttention: sums along antidiagonals of the attention map decide which key blocks the prefill reads."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors.attention._blocks import cover, per_head
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask

CHUNK = 1 << 26  # scores in memory at once
PARTS = 8  # chunks of queries into which a long prompt is cut, each with the keys up to its end
LEAST = 256  # rows of a chunk, at least


class XAttention(SparseAttention):
    """Every `stride` neighbouring queries, in reverse order, and every `stride` neighbouring keys are concatenated into
    one long vector each. The products of these vectors, divided by `stride` and softmaxed over the causal keys, are
    sums along antidiagonals of the attention map. Summed per pair of blocks, they are the scores of the blocks: every
    query block reads the heaviest until they hold `threshold` of the sum, always including, and counting, the first
    block and the diagonal.

    Paper: https://arxiv.org/abs/2503.16428
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.16428"
    deviations: ClassVar[str] = (
        "One threshold for all heads; the authors also ship tuned tables for Llama. Without the defects of their code: "
        "the first chunk of queries counts its first block like all others (one block more there), zero padding hides "
        "only itself, and padding tokens ask nothing. The attention's own scale is used."
    )

    stride: Literal[4, 8, 16] = Field(default=16, description="tokens of an antidiagonal; authors: 8 or 16")
    threshold: float = Field(default=0.9, gt=0, le=1, description="share of the scores that has to be covered")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.size % self.stride:
            raise ValueError(f"size {self.size} must be a multiple of stride {self.stride}")
        return self

    def reads(self, prompt: PrefillQK) -> SparseMask:
        groups = prompt.q.split(prompt.heads // len(prompt.k))
        blocks = [self._blocks(q, k[None], prompt.scale) for q, k in zip(groups, prompt.k, strict=True)]
        return SparseMask(self.size, torch.cat(blocks))

    def _blocks(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[H, T, T] blocks for the query heads of one key head."""
        score = self.scores(q, per_head(k, len(q)), scale)
        t = torch.arange(score.shape[-1], device=q.device)
        always = (t == 0) | (t[:, None] == t)
        return cover(score, self.threshold, always=always & (t <= t[:, None])) & (t <= t[:, None])

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[H, T, T] scores of pairs of blocks, from q and k [H, N, d]: softmaxed antidiagonal sums, summed per pair."""
        n, stride, size = q.shape[1], self.stride, self.size
        per = size // stride
        asked, keys = (pad(x, (0, 0, 0, -n % size)).unflatten(1, (-1, stride)) for x in (q, k))
        asked, keys = asked.flip(2).flatten(2), keys.flatten(2)
        count, blocks = keys.shape[1], keys.shape[1] // per
        at = torch.arange(count, device=q.device)
        out = torch.zeros(len(q), blocks, blocks, device=q.device)
        fits = CHUNK // max(1, len(q) * count)
        each = per * max(1, min(fits, max(LEAST, -(-count // PARTS))) // per)
        for first in range(0, count, each):
            place = at[first : first + each]
            last = first + len(place)
            # Scaled first: in half precision, a sum of this many products may overflow.
            products = (asked[:, first:last] * (scale / stride) @ keys[:, :last].transpose(1, 2)).float()
            products[..., first:].masked_fill_(place > place[:, None], -torch.inf)
            shares = products.softmax(-1).mul_((place * stride < n)[:, None])
            sums = shares.unflatten(2, (-1, per)).sum(-1).unflatten(1, (-1, per)).sum(2)
            out[:, first // per : last // per, : last // per] = sums
        return out
