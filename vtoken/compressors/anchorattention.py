"""AnchorAttention: single keys whose scores come near the maximum of what is read anyway, for groups of queries."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from vtoken.compressors._blocks import block_mean
from vtoken.kernels import row_maxima
from vtoken.reading import Prompt, Reads, SparseAttention, causal, everything


class AnchorAttention(SparseAttention):
    """Queries stand in groups of `step` blocks. All read the first block of keys, and everything from one block in front of their
    group on. The largest score of a query among these, averaged over its block, is the block's anchor. A key between the two
    is read by the whole group if the score of one of its blocks' mean queries comes within `theta` (natural units) of that block's
    anchor. The queries behind the last whole group read everything; so does a prompt of less than a group.

    Nothing is sorted, and no share is fixed: a larger `theta` reads more.

    Paper: https://aclanthology.org/2025.emnlp-main.430
    """

    paper: ClassVar[str] = "https://aclanthology.org/2025.emnlp-main.430"
    deviations: ClassVar[str] = (
        "The authors' released kernel reads the whole first group, counts its chosen keys twice, and never reads the block in front "
        "of a group; an earlier kernel in their repository has the ranges taken here. `released` takes the released ranges, each key "
        "counted once. Scores and anchors are compared in fp32, theirs in half precision. The maxima are computed apart from "
        "the attention, theirs in one pass, so what is read by all is scored twice. Evaluated by its authors on text models alone."
    )

    theta: float = Field(default=12.0, description="how far below the anchor a key may score, natural logarithm")
    step: int = Field(default=16, ge=1, description="blocks of queries that share their single keys; authors: 16 or 32")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")
    dense_tail: bool = Field(
        default=True, description="queries behind the last whole group read everything, as in the authors' code"
    )
    released: bool = Field(default=False, description="the ranges of the authors' released kernel, see the deviations")

    def reads(self, prompt: Prompt) -> Reads:
        n, size, device = prompt.length, self.size, prompt.q.device
        whole = n // (self.step * size) * self.step if self.dense_tail else -(-n // size)
        blocks = everything(prompt.heads, n, n, size, device)
        if whole <= self.step:
            return Reads(size, blocks)
        t = torch.arange(blocks.shape[1], device=device)
        first = t // self.step * self.step
        first, initial = (first, self.step) if self.released else (first - 1, 1)
        exact = ((t < initial) | (t >= first[:, None])) & causal(blocks)
        searched = t[:, None] < whole
        maxima = row_maxima(prompt.q, prompt.k, (exact & searched).expand_as(blocks), prompt.scale, size)
        anchors = block_mean(maxima[..., None], size)[..., 0]
        columns = self._stripes(prompt, anchors, whole)
        return Reads(size, (exact | ~searched & causal(blocks)).expand_as(blocks), columns, self.step)

    def _stripes(self, prompt: Prompt, anchors: Tensor, whole: int) -> Tensor:
        """[H, G, C] the single keys of every group, -1 behind them; `anchors` [H, T], groups up to block `whole`."""
        size, step, groups = self.size, self.step, prompt.heads // len(prompt.k)
        total = -(-anchors.shape[1] // step)
        taken = torch.zeros(prompt.heads, total, prompt.length, dtype=torch.bool, device=anchors.device)
        for head, k in enumerate(prompt.k):
            mine = slice(head * groups, (head + 1) * groups)
            means, keys = block_mean(prompt.q[mine], size), k.float().T
            for group in range(1, -(-whole // step)):
                rows = slice(group * step, min(whole, (group + 1) * step))
                between = slice(size, (group * step - 1) * size)
                scores = means[:, rows] @ keys[:, between] * prompt.scale
                taken[mine, group, between] = (scores + self.theta >= anchors[mine, rows, None]).any(1)
        return listed(taken)


def listed(taken: Tensor) -> Tensor:
    """[..., C] int32: the ascending positions of the True of [..., N], -1 behind them; C is the largest count, at least 1."""
    counts = taken.sum(-1).flatten()
    out = torch.full((len(counts), max(1, int(counts.max()))), -1, dtype=torch.int32, device=taken.device)
    row, position = taken.flatten(0, -2).nonzero(as_tuple=True)
    before = counts.cumsum(0) - counts
    out[row, torch.arange(len(row), device=row.device) - before[row]] = position.int()
    return out.unflatten(0, taken.shape[:-1])
