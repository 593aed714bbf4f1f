"""For `ivc_prune`: how much tokens attend to each other if values stand in for queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.pruners._pools import top
from vtoken.stages import VisualTokens

CHUNK = 1 << 24  # fp32 weights in memory at once: 64 MiB


def weigh(tokens: VisualTokens, share: float, skip: int) -> tuple[Tensor, Tensor, Tensor]:
    """[ΣN] each: the weight that a visual token gets from the text after its image, mean over that text; the mean over
    text and seeds; whether the token is a seed. Without text after it, an image's own tokens take the place of text.

    Args:
        share: share of an image's tokens that are seeds, at least one token.
        skip: how many tokens right after an image are ignored, unless no other text follows it.
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
    """[N] weight that each row of `values` [N, heads, d] gets from the rows of `asking` [T, heads, d] by a softmax over
    the N rows: sum over T, mean over heads. Tensors without a head axis have one head."""
    values, asking = (x.float() if x.ndim == 3 else x.float()[:, None] for x in (values, asking))
    total = values.new_zeros(len(values))
    for part in asking.split(max(1, CHUNK // max(1, values[..., 0].numel()))):
        logits = torch.einsum("thd,nhd->htn", part, values) * values.shape[-1] ** -0.5
        total = total + logits.softmax(-1).mean(0).sum(0)
    return total
