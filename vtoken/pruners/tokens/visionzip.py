"""VisionZip: keep what the CLS token attends to, and merge the rest into a few contextual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from vtoken.kernels import nearest_tokens
from vtoken.pruners._pools import choose_alike, merged, offsets_on_host, top
from vtoken.stages import Fact, Fused, Keep, Pruner, VisualTokens


class VisionZip(Pruner):
    """Of the k tokens to keep, c are contextual and k - c dominant. The dominant tokens are those with the highest CLS
    attention. Of the other r tokens, every (r // c)-th is a target, c in all; each remaining token joins the target
    with the most similar key (cosine of keys averaged over heads). The encoder features of a target become their sum
    with the mean of the tokens that joined it, and go through the projector. With k = 1 nothing is merged.

    On Qwen, whose merger makes one token of four patches, and after a stage that merged, the sum is one of embeddings.

    Paper: https://arxiv.org/abs/2412.04467. Images (or frames, or crops) of equal size and budget run together.

    Raises:
        ValueError: at run time, if the encoder's keys cannot be split into `heads`.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2412.04467"
    deviations: ClassVar[str] = (
        "The CLS token, which the authors count as one dominant token, is not available: one more patch takes its "
        "slot. Contextual tokens take their targets' places in reading order instead of coming last. Where "
        "OneVision scales tokens down after the projector, sums are of scaled features. Keys are averaged over heads "
        "only if `heads` says how many there are (the presets do)."
    )

    contextual: int | None = Field(
        default=None,
        ge=0,
        description="merged tokens among those kept of an image (or frame, or crop); null: 10 of every 64, as in all "
        "published budgets",
    )
    heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads of the vision encoder (16 in CLIP-L, SigLIP-so400m and Qwen), whose keys are "
        "averaged; null: compare the keys of all heads side by side",
    )
    halve: bool = Field(
        default=False,
        description="contextual tokens are half target, half mean of the embeddings, instead of the authors' sum "
        "before the projector",
    )

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("keys"), *(() if self.halve else (Fact("features"),)))

    def tower_incompatibility(self, width: int, unit: int) -> str:
        if self.heads is None or width % self.heads == 0:
            return ""
        return (
            f"heads: {self.heads} does not divide the encoder's keys, {width} wide; write the encoder's number of "
            "attention heads, or leave it out"
        )

    def select(self, tokens: VisualTokens) -> Keep:
        attention, keys = tokens.fact("cls_attention"), normalize(self._metric(tokens.fact("keys")), dim=-1)
        home = torch.arange(len(keys), device=keys.device)
        weight = torch.ones(len(keys), device=keys.device)
        one, summed, factors, dropped = weight[:1].clone(), [], [], []

        def pick(rows: Tensor, k: int) -> Tensor:
            c = self._merged(k)
            order = rows.gather(1, top(attention[rows], rows.shape[1]))
            dominant, rest = order[:, : k - c], order[:, k - c :].sort().values
            if not c:
                home[rest] = -1
                dropped.append(rest)
                return dominant
            pools, step = len(rest), rest.shape[1] // c
            targets, between = rest[:, : c * step : step], rest[:, : c * step].unflatten(1, (c, step))[:, :, 1:]
            other = torch.cat([between.flatten(1), rest[:, c * step :]], 1).flatten()
            target = targets.flatten()
            ends = offsets_on_host([len(other) // pools] * pools), offsets_on_host([c] * pools)
            _, nearest = nearest_tokens(keys[other], keys[target], *ends, unit=True)
            home[other] = target[nearest]
            members = torch.zeros(len(target), device=rows.device).index_add_(0, nearest, one.expand(len(other)))
            weight[other] = members.reciprocal()[nearest]
            summed.append(target)
            factors.append(1 + members.clamp(max=1))
            return torch.cat([dominant, targets], 1)

        keep = choose_alike(self, tokens, pick)
        if keep.lengths == tokens.lengths:
            return keep
        keep = merged(keep, home, weight, complete=not dropped)
        if self.halve or not summed:
            return keep
        features = tokens.fact("features") if tokens.size is None else None
        slots = torch.searchsorted(keep.index, torch.cat(summed))
        return replace(keep, fused=Fused(slots, torch.cat(factors), features))

    def _merged(self, k: int) -> int:
        """Number of contextual tokens among k."""
        return min(max(1, k * 10 // 64) if self.contextual is None else self.contextual, k - 1)

    def _metric(self, keys: Tensor) -> Tensor:
        """[ΣN, d] vectors whose similarity is compared."""
        return keys.float() if self.heads is None else keys.unflatten(1, (self.heads, -1)).float().mean(1)

    def flops(self, lengths: Sequence[int], width: int) -> int:
        """Similarities counted at the model's width, the merge, and two layers of a projector for the merged tokens."""
        pairs = zip(lengths, self.keep.counts(lengths, (0,) * len(lengths)), strict=True)
        project = 0 if self.halve else 4 * width * width
        return sum(2 * n * (c + 1) * width + c * project for n, k in pairs if k < n for c in [self._merged(k)])
