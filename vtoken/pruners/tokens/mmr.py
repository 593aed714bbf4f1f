"""MMR: the most important tokens that do not resemble one another (maximal marginal relevance)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose_alike
from vtoken.stages import Fact, Keep, Pruner, VisualTokens


class MMR(Pruner):
    """Importance is CLS attention, scaled to 0 to 1 over the image. Starts with the most important token, then adds,
    until `keep` are found, the one with the largest balance * importance - (1 - balance) * cosine to the kept token
    that is most like it (projected embeddings). Ties go to the lower index. balance 1 is the highest attention,
    0 is farthest-first from the most important token.

    Paper: https://doi.org/10.1145/290941.291025 (maximal marginal relevance). IDPruner (AngelSlim,
    https://github.com/Tencent/AngelSlim) selects like this, by importance from a trained scorer. A loop over kept
    tokens; images (or frames, or crops) of equal size and budget together, with all their cosines (4 N^2 bytes each).
    """

    paper: ClassVar[str] = "https://doi.org/10.1145/290941.291025"
    deviations: ClassVar[str] = "Importance is attention instead of IDPruner's trained scorer."

    balance: float = Field(default=0.5, ge=0, le=1, description="weight of importance; the rest is that of diversity")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        attention, x = tokens.fact("cls_attention").float(), normalize(tokens.x.float(), dim=-1)

        def pick(rows: Tensor, k: int) -> Tensor:
            return rows.gather(1, marginal(x[rows], attention[rows], k, self.balance))

        return choose_alike(self, tokens, pick)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """All similarities; segments of an image are taken together."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * n * width for n, k in zip(lengths, counts, strict=True) if k < n)


def marginal(unit: Tensor, importance: Tensor, k: int, balance: float) -> Tensor:
    """[pools, k] positions among the rows `unit` [pools, n, D] (unit length), by importance [pools, n], in the order
    taken. Does not wait for the device."""
    low, high = importance.aminmax(dim=1, keepdim=True)
    # Scaled as in IDPruner; 1e-6 is for pools of equally important tokens.
    worth = balance * (importance - low) / (high - low + 1e-6)
    cosine = torch.bmm(unit, unit.transpose(1, 2))
    taken = [importance.argmax(1, keepdim=True)]
    nearest = torch.full_like(importance, -2)
    for _ in range(k - 1):
        nearest = nearest.maximum(cosine.gather(1, taken[-1][..., None].expand(-1, -1, cosine.shape[2]))[:, 0])
        worth = worth.scatter(1, taken[-1], -torch.inf)
        taken.append((worth - (1 - balance) * nearest).argmax(1, keepdim=True))
    return torch.cat(taken, 1)
