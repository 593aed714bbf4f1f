"""Weights that tokens give each other by their values, for `ivc_prune`."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.pruners._pools import top
from vtoken.stages import VisualTokens

CHUNK = 1 << 24  # weights in memory at once: 64 MiB


def weigh(tokens: VisualTokens, share: float, skip: int) -> tuple[Tensor, Tensor, Tensor]:
    """[ΣN] each: the mean weight that the text gives to a token, its mean over text and seeds, and whether it is a
    seed.

    Args:
        share: of an image that are seeds, at least one token; skip: tokens of the text that are not asked, unless there
            are no others.
    """
    weights, scores, seeds = [], [], []
    images = tokens.fact("values").split(list(tokens.lengths))
    for values, text in zip(images, tokens.fact("later_values"), strict=True):
        asking = text[skip:] if len(text) > skip else text if len(text) else values
        count = min(len(values), max(1, round(len(values) * share)))
        given = weights_of(values, asking)
        best = top(given, count)
        weights.append(given / max(1, len(asking)))
        scores.append((given + weights_of(values, values[best])) / max(1, len(asking) + count))
        seeds.append(torch.zeros_like(given, dtype=torch.bool).index_fill(0, best, True))
    return torch.cat(weights), torch.cat(scores), torch.cat(seeds)


def weights_of(values: Tensor, asking: Tensor) -> Tensor:
    """[N] weights that values [N, heads, d] are given by others [T, heads, d], sum over them, mean over heads. Without
    a head axis there is one head."""
    values, asking = (x.float() if x.ndim == 3 else x.float()[:, None] for x in (values, asking))
    total = values.new_zeros(len(values))
    for part in asking.split(max(1, CHUNK // max(1, values[..., 0].numel()))):
        logits = torch.einsum("thd,nhd->htn", part, values) * values.shape[-1] ** -0.5
        total = total + logits.softmax(-1).mean(0).sum(0)
    return total
