"""Attention of a layer whose key heads are in classes: computed once per class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vtoken.hooks.state.classed_layer import ClassedLayer
from vtoken.hooks.state.head_class import HeadClass


def read(
    cached: ClassedLayer,
    q: Tensor,
    scale: float,
    attend: Callable[..., Any] | None = None,
    free: Tensor | None = None,
) -> Tensor:
    """Attention [B, n, H, d] of the newest queries [B, H, n, d] over what each class holds.

    Args:
        attend: attend(q, k, v, mask), the model's own attention; runs where all queries see all of a class.
        free: as in HeadClass.seen.
    """
    by_key = q.unflatten(1, (sum(each.heads.shape[1] for each in cached.classes), -1))
    out = by_key.new_empty(*by_key.shape[:-1], cached.classes[0].values.shape[-1])
    for each in cached.classes:
        mine = each.own(by_key)
        x = _attention(each, mine.flatten(1, 2), scale, attend, free).unflatten(1, mine.shape[1:3])
        out = out.scatter(1, each.heads[:, :, None, None, None].expand_as(x), x)
    return out.flatten(1, 2).transpose(1, 2)


def _attention(
    head_class: HeadClass, q: Tensor, scale: float, attend: Callable[..., Any] | None, free: Tensor | None
) -> Tensor:
    """[B, H', n, d] for the query heads of one class."""
    new = q.shape[2]
    seen, keys, values = head_class.seen(new, free), head_class.keys, head_class.values
    if head_class.lost is None:
        if seen is None and attend is not None:
            own: Tensor = attend(q, keys, values, None)[0]
            return own.transpose(1, 2)
        mask = None if seen is None else seen[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask, scale=scale, enable_gqa=True)
    # In fp32: half precision would hold the logarithm of a number of tokens to three digits.
    count, *means = head_class.unseen(new, free)
    bias = count.log()[:, None].expand(-1, new, -1)
    if bias.shape[2] > 1:
        bias = bias.masked_fill(~torch.eye(new, dtype=torch.bool, device=q.device), -torch.inf)
    plain = bias.new_zeros(len(bias), new, head_class.length)
    if seen is not None:
        plain = plain.masked_fill(~seen, -torch.inf)
    keys, values = (torch.cat([t.float(), mean], 2) for t, mean in zip((keys, values), means, strict=True))
    mask = torch.cat([plain, bias], 2)[:, None]
    return F.scaled_dot_product_attention(q.float(), keys, values, mask, scale=scale, enable_gqa=True).to(q.dtype)
