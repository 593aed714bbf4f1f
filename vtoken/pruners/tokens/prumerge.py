"""PruMerge and PruMerge+: keep the outliers of the CLS attention, and let them absorb tokens with similar keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.pruners._pools import choose, merged, rest_of, top
from vtoken.stages import Fact, Keep, Parts, Pruner, VisualTokens
from vtoken.stages.budget import Budget


class PruMerge(Pruner):
    """Without `keep`, the picture decides: the tokens whose CLS attention in the encoder's last layer lies above Q3 +
    1.5 IQR of the image's stay (at least one); `plus` adds every s-th token except the image's last, where s is a third
    of N / outliers. With `keep`, the tokens with the highest attention stay; with `plus`, the outliers and evenly
    spaced others. A dropped token is merged into the most similar kept token (cosine similarity of keys) among those
    that have it among their `neighbours` nearest; its weight is its attention, that of the kept token is 1. If there is
    no such token, it is lost.

    Without `keep`, `expected_counts` uses the papers' averages: a 14th of the tokens, a quarter with `plus`. Loops over
    images; the number of outliers is fetched from the device. All similarities between kept and other tokens are
    sorted, because `nearest_tokens` finds one neighbour of a token, and a kept token asks for 32.

    Paper: https://arxiv.org/abs/2403.15388.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.15388"
    deviations: ClassVar[str] = (
        "Attention is the mean over heads; the authors' softmax over the full width, without heads, is not available, "
        "so adaptive counts differ from theirs. A token joins one kept token and the sum is normalised, after the "
        "projector; the authors let kept tokens share neighbours, and one another, and add up before it. The authors' "
        "extra token, the attention-weighted sum of all dropped ones, is left out: it has no place in the picture. "
        "Reading order instead of order by attention."
    )

    keep: Budget | None = Field(  # type: ignore[assignment]
        default=None, description="tokens that stay; null: the picture decides"
    )
    plus: bool = Field(default=False, description="PruMerge+: add evenly spaced tokens")
    neighbours: int = Field(default=32, ge=0, description="tokens most similar to a kept one that it may absorb")

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention", -1), Fact("keys", -1))

    def select(self, tokens: VisualTokens) -> Keep:
        attention = tokens.fact("cls_attention", -1).float()
        keys = normalize(tokens.fact("keys", -1).float(), dim=-1)
        home, weight = torch.full((len(attention),), -1, device=attention.device), attention.clone()

        def pick(rows: Tensor, k: int | None) -> Tensor:
            chosen = self._chosen(attention[rows], k).sort().values
            others = rest_of(len(rows), chosen)
            home[rows[others]] = self._homes(keys[rows], chosen, others, rows)
            weight[rows[chosen]] = 1
            return rows[chosen]

        if self.keep is not None:
            keep = choose(self, tokens, pick)
            return keep if keep.lengths == tokens.lengths else merged(keep, home, weight)
        pools = torch.arange(len(attention), device=home.device).split(list(tokens.lengths))
        kept = [pick(rows, None) if len(rows) else rows for rows in pools]
        return merged(Keep(torch.cat(kept), tuple(map(len, kept))), home, weight)

    def _chosen(self, attention: Tensor, k: int | None) -> Tensor:
        """Positions in a pool of the tokens that stay, in any order; k of them, if given."""
        if k is not None and not self.plus:
            return top(attention, k)
        n, (low, high) = len(attention), attention.quantile(attention.new_tensor([0.25, 0.75]))
        outliers = max(1, int((attention > high + 1.5 * (high - low)).sum()))
        if k is not None and outliers >= k:
            return top(attention, k)
        chosen = top(attention, outliers)
        if not self.plus:
            return chosen
        if k is None:
            evenly = torch.arange(0, n - 1, max(1, n // outliers // 3), device=chosen.device)
            return torch.cat([chosen, evenly]).unique()
        more = k - outliers
        evenly = (torch.arange(more, device=chosen.device) * 2 + 1) * (n - outliers) // (2 * more)
        return torch.cat([chosen, rest_of(n, chosen)[evenly]])

    def _homes(self, keys: Tensor, chosen: Tensor, others: Tensor, rows: Tensor) -> Tensor:
        """[others] packed row of the kept token that absorbs each, -1 for none."""
        cosine = keys[chosen] @ keys.T
        cosine.scatter_(1, chosen[:, None], -torch.inf)
        near = cosine.sort(dim=1, descending=True, stable=True).indices[:, : self.neighbours]
        wanted = torch.zeros_like(cosine, dtype=torch.bool).scatter_(1, near, True)[:, others]
        best = cosine[:, others].masked_fill(~wanted, -torch.inf).argmax(0)
        return torch.where(wanted.any(0), rows[chosen[best]], -1)

    def expected_counts(
        self, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], layer: int | None = None
    ) -> tuple[int, ...]:
        if self.keep is not None:
            return super().expected_counts(lengths, parts, row, layer)
        return tuple(min(n, max(1, n // (4 if self.plus else 14))) for n in lengths)

    def counts_are_exact(self, layer: int | None = None, whole: bool = True) -> bool:
        return self.keep is not None and super().counts_are_exact(layer, whole)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities, counted at the model's width, and the merge."""
        row = (0,) * len(lengths)
        counts = self.expected_counts(lengths, (), row) if self.keep is None else self.keep.counts(lengths, row)
        return sum(2 * n * (k + 1) * width for n, k in zip(lengths, counts, strict=True) if k < n)
