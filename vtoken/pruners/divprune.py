"""DivPrune: keep the tokens that lie farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose
from vtoken.stages import Keep, Pruner, VisualTokens


class DivPrune(Pruner):
    """Distance is 1 - cosine of the projected embeddings. Starts with the token whose nearest neighbour is farthest away, then adds the
    token whose nearest kept one is farthest away until `keep` are found (greedy max-min).

    Paper: https://arxiv.org/abs/2503.02175. Loops over images and kept tokens: each choice needs the one before. No N x N matrix is
    held.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    deviations: ClassVar[str] = (
        "A token is never chosen twice (the authors can repeat exact duplicates and then keep fewer). "
        "Newline tokens follow the newline policy; the authors let them compete on LLaVA-NeXT. "
        "Cosines are float32."
    )

    def select(self, tokens: VisualTokens) -> Keep:
        return choose(self, tokens, lambda rows, k: rows[farthest(normalize(tokens.x[rows].float(), dim=-1), k)])

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """The search for the first token, and one row of similarities per kept token; segments of an image are taken together."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (n + k) * width for n, k in zip(lengths, counts, strict=True) if k < n)


def farthest(x: Tensor, k: int) -> Tensor:
    """[k] rows of x [n, D] (unit length), in the order they were chosen; 1 <= k < n."""
    closest = torch.cat([nearest_other(x, start) for start in range(0, len(x), 1024)])
    best = closest.argmin(keepdim=True)
    chosen, near = [best], x @ x[best][0]
    for _ in range(k - 1):
        best = near.index_fill_(0, best, torch.inf).argmin(keepdim=True)
        chosen.append(best)
        near = torch.maximum(near, x @ x[best][0])
    return torch.cat(chosen)


def nearest_other(x: Tensor, start: int) -> Tensor:
    """Highest cosine of each of up to 1024 rows, from `start` on, with any other row."""
    cosine = x[start : start + 1024] @ x.T
    cosine.diagonal(start).fill_(-torch.inf)
    return cosine.amax(1)
