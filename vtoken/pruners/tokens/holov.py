"""HoloV: divide the budget over chunks of the picture, so that every part of it keeps tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens

EPSILON = 1e-6


class HoloV(Pruner):
    """Cuts the tokens, in reading order, into equal chunks (if they do not divide evenly, the first chunks have one
    more). The score of a token is its CLS attention plus `variance` times the variance of its cosine similarities
    (projected embeddings) to the other tokens of its chunk, scaled so that its mean is that of the attention. Chunks
    get tokens in proportion to their mean scores, rounded down; the remaining tokens go one by one to the chunks with
    the highest scores. Each chunk keeps its tokens with the highest CLS attention.

    The authors' code scales the variance chunk by chunk. There it cancels, and shares depend on attention only. With
    `scaling: image` it has an effect.

    Paper: https://arxiv.org/abs/2510.02912. Loops over images (or frames, or crops) and chunks; the shares are fetched
    from the device.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2510.02912"
    deviations: ClassVar[str] = (
        "Tokens that do not fit in a full chunk go to the others; the authors fill up with zero tokens. Reading order "
        "instead of attention order within a chunk. A chunk of one token is scored like the others (the authors leave "
        "out their factor of 1000)."
    )

    variance: float = Field(default=0.09, ge=0, description="weight of the variance of similarities in a token's score")
    scaling: Literal["chunk", "image"] = Field(
        default="chunk",
        description="what the variance is scaled to: the mean attention of its chunk, as in the authors' code, or of "
        "the image",
    )
    chunks: int | None = Field(
        default=None,
        ge=1,
        description="chunks of an image (or frame, or crop); null: 1024/576 N/k, which is 16 for 64 of 576 tokens",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        attention = tokens.fact("cls_attention").float()

        def pick(rows: Tensor, k: int) -> Tensor:
            sizes = self._sizes(len(rows), k)
            scores = self._scores(tokens.x[rows].float(), attention[rows], sizes)
            counts = shares(scores.tolist(), sizes, k)
            chunks = zip(rows.split(sizes), counts, strict=True)
            return torch.cat([chunk[top(attention[chunk], n)] for chunk, n in chunks])

        return choose(self, tokens, pick)

    def _sizes(self, n: int, k: int) -> list[int]:
        chunks = min(n, max(1, 1024 * n // (576 * k)) if self.chunks is None else self.chunks)
        return [n // chunks + (i < n % chunks) for i in range(chunks)]

    def _scores(self, x: Tensor, attention: Tensor, sizes: list[int]) -> Tensor:
        """[chunks] mean score of the tokens of each chunk."""
        spread = torch.stack([variance_of_cosines(chunk) for chunk in x.split(sizes)])
        mean = torch.stack([chunk.mean() for chunk in attention.split(sizes)])
        if self.scaling == "chunk":
            return mean * (1 + self.variance * spread / (spread + EPSILON))
        size = mean.new_tensor(sizes)
        return mean + self.variance * spread * attention.mean() / ((spread * size).sum() / size.sum() + EPSILON)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities within chunks; the segments of an image are counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        pairs = [(n, k) for n, k in zip(lengths, counts, strict=True) if k < n]
        return sum(2 * size * size * width for n, k in pairs for size in self._sizes(n, k))


def variance_of_cosines(x: Tensor) -> Tensor:
    """[] variance of the cosine similarities of each token of x [n, D] to the others, averaged over tokens. As in the
    authors' code, the similarity to itself takes part as a zero."""
    others = max(1, len(x) - 1)
    x = normalize(x, dim=-1)
    cosine = (x @ x.T).fill_diagonal_(0)
    return (cosine - cosine.sum(1, keepdim=True) / others).square().sum(1).mean() / others


def shares(scores: Sequence[float], sizes: Sequence[int], k: int) -> list[int]:
    """Tokens to keep of each chunk: k divided in proportion to the scores, at most the size of the chunk; the rest is
    dealt out one by one in order of falling score."""
    total = sum(scores) or 1.0
    out = [min(n, int(score / total * k)) for score, n in zip(scores, sizes, strict=True)]
    order = sorted(range(len(scores)), key=lambda c: -scores[c])
    while sum(out) < k:
        for c in order:
            if out[c] < sizes[c] and sum(out) < k:
                out[c] += 1
    return out
