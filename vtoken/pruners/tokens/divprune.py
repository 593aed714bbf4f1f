"""DivPrune: keep the tokens that lie farthest apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from vtoken.kernels import farthest_tokens
from vtoken.pruners._pools import choose_together
from vtoken.stages import Keep, Pruner, VisualTokens


class DivPrune(Pruner):
    """The distance is 1 - cosine similarity of the projected embeddings. Starts with the token whose nearest neighbour
    is farthest away, then repeatedly adds the token whose nearest kept token is farthest away, until `keep` are chosen
    (greedy max-min).

    Paper: https://arxiv.org/abs/2503.02175. Each choice needs the one before: on a CPU a loop over kept tokens, without
    an N x N matrix; on a GPU one launch, with an N x N matrix.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2503.02175"
    deviations: ClassVar[str] = (
        "A token is never chosen twice (the authors can repeat exact duplicates and then keep fewer). "
        "Newline tokens follow the newline policy; the authors let them compete on LLaVA-NeXT. "
        "Cosines are float32. A share halfway between two counts gives the smaller count, theirs the even one."
    )

    def select(self, tokens: VisualTokens) -> Keep:
        def pick(rows: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
            return farthest_tokens(tokens.x[rows], lengths, counts)

        return choose_together(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """The search for the first token, and one row of similarities per kept token; the segments of an image are
        counted as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (n + k) * width for n, k in zip(lengths, counts, strict=True) if k < n)
