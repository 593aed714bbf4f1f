"""Sparse prefill that reads everything, and one with another pattern in every head."""

from __future__ import annotations

from typing import Any

import torch

from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, everything


class Everything(SparseAttention):
    """SparseMask all blocks. No paper."""

    min_len: int = 0

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n = prompt.length
        return SparseMask(16, everything(prompt.heads, n, n, 16, prompt.q.device))


class Ladder(SparseAttention):
    """Each head another pattern: own block, own and first, single keys besides, dense queries besides. No paper."""

    min_len: int = 0
    seen: Any = None

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, heads = prompt.length, prompt.heads
        if self.seen is not None:
            self.seen.append(prompt)
        t = torch.arange(-(-n // 16))
        own = t[:, None] == t
        blocks = torch.stack([own | (t == 0) if h % 2 else own for h in range(heads)])
        columns = torch.stack([torch.arange(0, n, 5) if h > 1 else torch.full((-(-n // 5),), -1) for h in range(heads)])
        dense = torch.zeros(heads, n, dtype=torch.bool)
        dense[2:, ::7] = True
        return SparseMask(16, blocks, columns[:, None].int(), len(t), dense)

    @staticmethod
    def mask(n, heads):
        """[H, N, N], worked out apart."""
        i, j = torch.arange(n)[:, None], torch.arange(n)
        masks = [i // 16 == j // 16] * heads
        for h in range(heads):
            if h % 2:
                masks[h] = masks[h] | (j < 16)
            if h > 1:
                masks[h] = masks[h] | (j % 5 == 0) | (i % 7 == 0)
        return torch.stack(masks) & (j <= i)
