"""AnchorAttention: reads single keys whose scores come close to the maximum of what is read anyway, per query group."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors.attention._blocks import block_mean
from vtoken.compressors.attention._singles import fullest, listed
from vtoken.kernels import row_maxima
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything


class AnchorAttention(SparseAttention):
    """Queries form groups of `step` blocks. All queries read the first block of keys, and everything from one block
    before their group on. The largest score of each query among these, averaged over a query block, is the block's
    anchor. A key in between is read by the whole group if its score with the mean query of any block of the group is at
    most `theta` (natural units) below that block's anchor. The queries after the last whole group read everything, and
    a prompt of at most one whole group is read whole.

    No share is fixed: a larger `theta` reads more. If a group chose more than `max_columns` keys, it reads the blocks
    with most of them whole, as few as leave at most `max_columns` in the others: never less than was chosen.

    Paper: https://aclanthology.org/2025.emnlp-main.430
    """

    paper: ClassVar[str] = "https://aclanthology.org/2025.emnlp-main.430"
    deviations: ClassVar[str] = (
        "The authors' released kernel reads the whole first group, counts its chosen keys twice, and never reads the "
        "block before a group; an earlier kernel in their repository has the ranges taken here. `released` takes the "
        "released ranges, each key counted once. Scores and anchors are compared in fp32, theirs in half precision. "
        "The maxima are computed separately from the attention, theirs in one pass, so the keys that all read are "
        "scored twice. A group lists at most `max_columns` keys and reads whole blocks beyond that, see above. Its "
        "authors evaluated it on text models only."
    )

    theta: float = Field(default=12.0, description="how far below the anchor a key may score, natural logarithm")
    step: int = Field(default=16, ge=1, description="blocks of queries that share their single keys; authors: 16 or 32")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")
    dense_tail: bool = Field(
        default=True, description="queries after the last whole group read everything, as in the authors' code"
    )
    max_columns: int = Field(
        default=8192, ge=1, description="single keys that a group lists; further ones are read with their block"
    )
    released: bool = Field(default=False, description="the ranges of the authors' released kernel, see the deviations")

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, size, device = prompt.length, self.size, prompt.q.device
        whole = n // (self.step * size) * self.step if self.dense_tail else -(-n // size)
        blocks = everything(prompt.heads, n, n, size, device)
        if whole <= self.step:
            return SparseMask(size, blocks)
        t = torch.arange(blocks.shape[1], device=device)
        first = t // self.step * self.step
        first, initial = (first, self.step) if self.released else (first - 1, 1)
        exact = ((t < initial) | (t >= first[:, None])) & causal(blocks)
        searched = t[:, None] < whole
        maxima = row_maxima(prompt.q, prompt.k, (exact & searched).expand_as(blocks), prompt.scale, size)
        anchors = block_mean(maxima[..., None], size)[..., 0]
        columns, full = (torch.cat(x) for x in zip(*self._stripes(prompt, anchors, whole, initial), strict=True))
        full = full.repeat_interleave(self.step, 1)[:, : len(t)]
        return SparseMask(size, full | exact | ~searched & causal(blocks), columns, self.step)

    def _stripes(self, prompt: PrefillQK, anchors: Tensor, whole: int, initial: int) -> Iterator[tuple[Tensor, Tensor]]:
        """For the query heads of every key head: the single keys of every group [h, G, C], padded with -1, and the
        blocks [h, G, M] that the group reads whole instead. `anchors` is [H, T]; blocks from `whole` on are in no
        group; the first `initial` blocks are read anyway."""
        size, step, groups = self.size, self.step, prompt.heads // len(prompt.k)
        total = -(-anchors.shape[1] // step)
        for head, k in enumerate(prompt.k):
            mine = slice(head * groups, (head + 1) * groups)
            means, keys = block_mean(prompt.q[mine], size), k.float().T
            taken = torch.zeros(groups, total, anchors.shape[1], size, dtype=torch.bool, device=anchors.device)
            for group in range(1, -(-whole // step)):
                rows = slice(group * step, min(whole, (group + 1) * step))
                scores = means[:, rows] @ keys[:, initial * size : (group * step - 1) * size] * prompt.scale
                near = (scores + self.theta >= anchors[mine, rows, None]).any(1)
                taken[:, group, initial : group * step - 1] = near.unflatten(1, (-1, size))
            full = fullest(taken.sum(-1, dtype=torch.int32), self.max_columns)
            taken &= ~full[..., None]
            yield listed(taken.flatten(2)[..., : prompt.length], self.max_columns), full
