"""VisionZip: keep what the CLS token attends to, and merge the rest into a few contextual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from vtoken.kernels import nearest_tokens
from vtoken.pruners._pools import choose, merged, offsets_on_host, rest_of, top
from vtoken.stages import Fact, Keep, Pruner, VisualTokens


class VisionZip(Pruner):
    """Of k tokens to keep, c are contextual and k - c dominant. Dominant are the tokens with the highest CLS attention. Of the r others every
    (r // c)-th, the first c of them, is a target; every token left joins the target whose key is most similar (cosine of keys
    averaged over heads). A target becomes half itself, half the mean of those that joined it. With k = 1 nothing is merged.

    Paper: https://arxiv.org/abs/2412.04467. Loops over images (or frames, or crops).

    Raises:
        ValueError: at run time, when the encoder's keys cannot be cut into `heads`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    deviations: ClassVar[str] = (
        "Contextual tokens are (target + mean) / 2 after the projector; the authors take the sum, before it. "
        "The CLS token, which the authors count as one dominant token, is not to be had: one more patch takes its slot. "
        "Contextual tokens stand at their targets' places in reading order instead of at the end. "
        "Keys are averaged over heads only if `heads` says how many there are (the presets do)."
    )

    contextual: int | None = Field(
        default=None,
        ge=0,
        description="merged tokens among those kept of an image (or frame, or crop); null: 10 of every 64, as in all published budgets",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads of the vision encoder (16 in CLIP-L, SigLIP-so400m and Qwen), whose keys are averaged; null: "
        "compare the keys of all heads side by side",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("keys"))

    def select(self, tokens: VisualTokens) -> Keep:
        attention, keys = tokens.fact("cls_attention"), self._metric(tokens.fact("keys"))
        home = torch.full((len(tokens.x),), -1, device=tokens.x.device)
        weight = torch.ones(len(tokens.x), device=tokens.x.device)

        def pick(rows: Tensor, k: int) -> Tensor:
            c = self._merged(k)
            dominant = top(attention[rows], k - c)
            rest = rest_of(len(rows), dominant)
            if not c:
                return rows[dominant]
            targets = torch.arange(c, device=rows.device) * (len(rest) // c)
            target, other = rows[rest[targets]], rows[rest[rest_of(len(rest), targets)]]
            ends = offsets_on_host([len(other)]), offsets_on_host([c])
            _, nearest = nearest_tokens(keys[other], keys[target], *ends)
            home[other] = target[nearest]
            members = torch.zeros_like(weight[:c]).index_add_(0, nearest, weight[other])
            weight[other] = 1 / members[nearest]
            return torch.cat([rows[dominant], target])

        keep = choose(self, tokens, pick)
        return keep if keep.lengths == tokens.lengths else merged(keep, home, weight)

    def _merged(self, k: int) -> int:
        """Contextual tokens among k."""
        return min(max(1, k * 10 // 64) if self.contextual is None else self.contextual, k - 1)

    def _metric(self, keys: Tensor) -> Tensor:
        """[ΣN, d] what similarity is taken of."""
        if self.heads is not None:
            if keys.shape[1] % self.heads:
                raise ValueError(
                    f"visionzip: heads: {self.heads} does not divide the encoder's keys, {keys.shape[1]} wide; write the encoder's "
                    "number of attention heads, or leave it out"
                )
            return keys.unflatten(1, (self.heads, -1)).float().mean(1)
        return keys

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities at the model's width, and the merge."""
        counts = self.keep.counts(lengths, (0,) * len(lengths))
        return sum(2 * n * (self._merged(k) + 1) * width for n, k in zip(lengths, counts, strict=True) if k < n)
