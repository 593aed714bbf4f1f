"""ProxyAttn: a few mean heads rank the key blocks for all heads; each head's last queries decide how many it reads."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors.attention._blocks import block_sum, cover, ranks
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything
from vtoken.stages.query_attention import shared

CHUNK = 1 << 26  # scores in memory at once


class ProxyAttn(SparseAttention):
    """Neighbouring heads form `proxies` groups; the mean of a group's queries and the mean of its keys are its proxy.
    Only the first of every `stride` tokens is used: after a causal softmax over these, the largest entry between two
    blocks is the score of the pair, for all heads of the group. How many blocks to read is decided per head: as many of
    the heaviest as hold `gamma` of the attention of its last `size` queries, at least `min_budget` tokens' worth. Every
    query block reads that number of its causal blocks (with `by_row`, the same share of them), those with the highest
    scores, always including the first block and its own.

    The scores cost proxies / (heads * stride^2) of the products of queries and keys. Prompts of at most `min_budget`
    tokens are read whole. As in FlexPrefill, the counts come from queries at the end of the prompt: with a short
    question, these are image tokens and the chat template.

    Paper: https://arxiv.org/abs/2509.24745
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2509.24745"
    deviations: ClassVar[str] = (
        "Written from descriptions of the paper; the authors' code was not available. Not established, and chosen "
        "here: blocks of 128; softmax over the tokens that the stride leaves; the first block and the diagonal are "
        "always read; the count is asked of the last 128 queries, which need not be an aligned block, and of the mass "
        "of blocks, not its mean over tokens (they differ in an incomplete last block). One count holds for all rows, "
        "as the paper's formula has it, so that early rows read all; the authors may scale it with the row (by_row). "
        "They evaluate text models only."
    )

    gamma: float = Field(
        default=0.95, gt=0, le=1, description="share of the last queries' attention; authors: 0.95 or 0.9"
    )
    proxies: int = Field(default=1, ge=1, description="groups of heads; authors: 1 for Llama-3.1-8B, 4 for Qwen2.5-7B")
    stride: Literal[1, 2, 4, 8, 16] = Field(default=4, description="one of this many tokens is scored")
    min_budget: int = Field(
        default=2048, ge=1, description="every query reads at least this many tokens, if there are as many"
    )
    by_row: bool = Field(
        default=False, description="a head reads the same share of the blocks in every row, instead of the same number"
    )
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        if heads % self.proxies == 0 and (key_heads % self.proxies == 0 or self.proxies % key_heads == 0):
            return ""
        return (
            f"{self.proxies} proxies cannot share out {heads} query heads on {key_heads} key heads evenly; "
            f"1 and {key_heads} proxies can"
        )

    def reads(self, prompt: PrefillQK) -> SparseMask:
        n, size = prompt.length, self.size
        least = -(-self.min_budget // size)
        if n <= least * size:
            return SparseMask(size, everything(prompt.heads, n, n, size, prompt.q.device))
        received = shared(prompt.query_attention, prompt.q, prompt.k, prompt.scale).received(size).flatten(0, 1)
        counts = cover(block_sum(received, size), self.gamma).sum(-1, keepdim=True)
        score = self.scores(prompt.q, prompt.k, prompt.scale)
        below = causal(score)
        t = torch.arange(len(below), device=below.device)
        order = ranks(score.masked_fill((t == 0) | (t[:, None] == t), torch.inf).masked_fill(~below, -1))
        most = -(-counts * (t + 1) // len(t)) if self.by_row else counts.expand(-1, len(t))
        # At least two: the first block and the diagonal, which rank first.
        most = most.clamp(min=max(2, least)).unflatten(0, (self.proxies, -1))
        return SparseMask(size, ((order[:, None] < most[..., None]) & below).flatten(0, 1))

    def scores(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """[G, T, T] fp32 scores from queries [H, N, d] and keys [Hk, N, d]: the largest attention between scored tokens
        of two blocks."""
        per, key_groups = self.size // self.stride, min(len(k), self.proxies)
        q = q[:, :: self.stride].unflatten(0, (self.proxies, -1)).mean(1)
        k = k[:, :: self.stride].unflatten(0, (key_groups, -1)).mean(1)
        k = k.repeat_interleave(self.proxies // key_groups, 0)
        total, out = q.shape[1], []
        place = torch.arange(total, device=q.device)
        each = per * max(1, CHUNK // (len(q) * total * per))
        for start in range(0, total, each):
            stop = min(total, start + each)
            products = (q[:, start:stop] * scale @ k[:, :stop].transpose(1, 2)).float()
            shares = products.masked_fill(place[:stop] > place[start:stop, None], -torch.inf).softmax(-1)
            shares = pad(shares, (0, -stop % per, 0, (start - stop) % per))
            tiles = shares.unflatten(2, (-1, per)).amax(-1).unflatten(1, (-1, per)).amax(2)
            out.append(pad(tiles, (0, -(-total // per) - tiles.shape[2])))
        return torch.cat(out, 1)
