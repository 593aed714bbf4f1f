"""CDPruner: keep tokens that differ from each other and matter to the question (a determinantal point process)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vtoken.kernels import diverse_tokens
from vtoken.pruners._pools import choose_together
from vtoken.stages import Fact, Keep, Pruner, VisualTokens

EPSILON = 1e-6


class CDPruner(Pruner):
    """The relevance r of a token follows from c, its cosine similarity to the mean text embedding of its row:
    (c - min + 1e-6) / (max - min) over the image (all its crops). The kernel is K_ij = r_i cos(x_i, x_j) r_j on
    projected embeddings. Keeps the greedy maximum of det K: repeatedly the token with the largest part of K_ii that the
    kept tokens do not explain. Tokens in the span of the kept ones (up to 1e-6) are taken last, by index.

    Paper: https://arxiv.org/abs/2506.10967. Each choice needs the one before: on a CPU a loop over kept tokens, on a
    GPU one launch. Without text, all tokens are equally relevant.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.10967"
    deviations: ClassVar[str] = (
        "Relevance comes from LLM embeddings of all text of the prompt, as described for Qwen2.5-VL; on LLaVA the "
        "authors use CLIP's text tower on the question alone, which the model does not hold, so published LLaVA "
        "figures are not reproduced. Relevance is not negated (the authors negate CLIP's; `negate` does). A kernel of "
        "low rank still gives `keep` tokens where the authors' turns NaN."
    )

    negate: bool = Field(
        default=False,
        description="tokens least similar to the text are the most relevant, as in the authors' code for CLIP",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("text"),)

    def select(self, tokens: VisualTokens) -> Keep:
        relevance = self._relevance(tokens)

        def pick(rows: Tensor, lengths: list[int], counts: list[int]) -> Tensor:
            return diverse_tokens(tokens.x[rows], relevance[rows], lengths, counts)

        return choose_together(self, tokens, pick)

    def _relevance(self, tokens: VisualTokens) -> Tensor:
        """[ΣN] relevance, above 0, up to about 1."""
        text, out = tokens.fact("text"), []
        for x, row in zip(tokens.x.float().split(list(tokens.lengths)), tokens.row, strict=True):
            words = text[row].float()
            if not len(words) or not len(x):
                out.append(x.new_ones(len(x)))
                continue
            cosine = cosine_similarity(x, words.mean(0, keepdim=True), dim=-1)
            low, high = (-cosine if self.negate else cosine).aminmax()
            out.append(((-cosine if self.negate else cosine) - low + EPSILON) / (high - low).clamp(min=EPSILON))
        return torch.cat(out)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Relevance, and per kept token one row of the kernel and its projection; the segments of an image are counted
        as one."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        pairs = zip(lengths, counts, strict=True)
        return sum(2 * n * width + n * k * (2 * width + k) for n, k in pairs if k < n)
