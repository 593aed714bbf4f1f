"""DART: keep a few pivots, and the tokens that are least similar to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn.functional import normalize, pad

from vtoken.kernels import topk_tokens
from vtoken.pruners._pools import top
from vtoken.stages import Fact, Keep, Pruner, Site, VisualTokens, keep_all
from vtoken.stages.budget import Budget


class DART(Pruner):
    """Before decoder layer `layer`, in every image: the pivots are the `image_pivots` visual tokens, and the
    `text_pivots` text tokens after the image, whose keys in the layer before have the largest L1 norm. Each pivot in
    turn, image pivots first, takes its share of the tokens not yet taken: those with the lowest cosine similarity to
    the pivot, between hidden states after the LLM's final norm. The image pivots and all tokens taken stay, `keep` in
    all; if shares are uneven, the first pivots take one more.

    Needs no attention. Paper: https://arxiv.org/abs/2502.11494. Loops over images to find pivots, then over pivots.
    """

    site: ClassVar[Site] = "decoder"
    paper: ClassVar[str] = "https://arxiv.org/abs/2502.11494"
    deviations: ClassVar[str] = (
        "Written from two ports by others, which agree, without the authors' repository. Counts are exact: the ports "
        "keep the pivots and a whole multiple of their number. Pivots take turns in order of their norms, where the "
        "ports go through a set."
    )

    layer: int = Field(default=2, ge=1, description="first decoder layer that sees fewer tokens")
    image_pivots: int = Field(default=4, ge=1, description="visual tokens that others are compared with")
    text_pivots: int = Field(
        default=4,
        ge=0,
        description="text tokens after the image that others are compared with; fewer if there are not so many",
    )

    @field_validator("keep")
    @classmethod
    def _of_images(cls, keep: Budget) -> Budget:
        if keep.per is not None:
            raise ValueError(
                f"dart compares the tokens of a whole image, so it takes no {keep.per} budget; write a count per "
                "image (64), a share (25%) or {total: 640}"
            )
        return keep

    def needs(self) -> tuple[Fact, ...]:
        text = (Fact("later_keys"), Fact("later_normed")) if self.text_pivots else ()
        return (Fact("keys"), Fact("normed"), *text)

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def select(self, tokens: VisualTokens) -> Keep:
        counts = self.keep.counts(tokens.lengths, tokens.row)
        if counts == tokens.lengths:
            return keep_all(tokens)
        keys, x = (tokens.fact(name).split(list(tokens.lengths)) for name in ("keys", "normed"))
        taken, likeness, start = [], [], 0
        for i, k in enumerate(counts):
            first = strongest(keys[i], min(self.image_pivots, k))
            pivots = x[i][first]
            if self.text_pivots:
                text = tokens.fact("later_normed")[i]
                pivots = torch.cat([pivots, text[strongest(tokens.fact("later_keys")[i], self.text_pivots)]])
            likeness.append(normalize(pivots.float(), dim=-1) @ normalize(x[i].float(), dim=-1).T)
            taken.append(first + start)
            start += tokens.lengths[i]
        return Keep(unlike(likeness, taken, tokens.offsets, counts), counts)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        pivots = self.image_pivots + self.text_pivots
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * pivots * width for n, k in zip(lengths, counts, strict=True) if k < n)


def strongest(keys: Tensor, n: int) -> Tensor:
    """[n] rows of keys [N, H*d] with the largest L1 norm, largest first; fewer if N < n."""
    return top(keys.float().abs().sum(1), n)


def unlike(likeness: list[Tensor], taken: list[Tensor], offsets: Tensor, counts: Sequence[int]) -> Tensor:
    """[ΣK] packed rows, ascending: those taken already, and those that each pivot takes, one pivot of every image at a
    time.

    Args:
        likeness: per image, similarity [P_i, N_i] of its pivots to its tokens.
        taken: per image, packed rows taken already; offsets: as in VisualTokens; counts: K_i, at least len(taken[i]).
    """
    most = max(map(len, likeness))
    table = torch.cat([pad(like, (0, 0, 0, most - len(like))) for like in likeness], 1)
    gone = torch.zeros_like(table[0]).index_fill_(0, torch.cat(taken), torch.inf)
    shares = [
        divmod(k - len(lengths), max(1, len(like))) for k, lengths, like in zip(counts, taken, likeness, strict=True)
    ]
    for p in range(most):
        turn = [(share + (p < more)) * (p < len(like)) for (share, more), like in zip(shares, likeness, strict=True)]
        gone = gone.index_fill(0, topk_tokens(-(table[p] + gone), offsets, turn), torch.inf)
    return topk_tokens(gone, offsets, list(counts))
