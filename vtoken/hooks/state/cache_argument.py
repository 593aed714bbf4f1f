"""The name that transformers gives to the argument, and to the field of outputs, that holds the KV cache."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from torch.nn.functional import pad
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

FORMER = "past_key_values"  # still taken from callers
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else FORMER


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache that a caller passes to the model, under either name."""
    return kwargs.get(CACHE, kwargs.get(FORMER))


def causal_mask(
    config: Any,
    hidden: Tensor,
    key_mask: Tensor | None,
    cache: Any,
    window: int | None = None,
    blocks: Tensor | None = None,
) -> Any:
    """The backend's form of a 2D mask, for hidden states [B, N, D] behind the tokens in the first layer of `cache`.

    Args:
        window: tokens that a query sees, itself among them; None: all up to itself. Padding, ours between turns
            included, takes no room in it.
        blocks: [B, slots] tokens of the same number see each other both ways, within the window; -1 at others.
    """
    named: dict[str, Any] = {CACHE: cache}
    given = {"config": config, "inputs_embeds": hidden, "attention_mask": key_mask, "position_ids": None, **named}
    if blocks is None and (window is None or key_mask is None):
        return create_causal_mask(**given) if window is None else create_sliding_window_causal_mask(**given)
    slots = hidden.shape[1] if cache is None else sum(cache.get_mask_sizes(hidden.shape[1], 0))
    functions: dict[str, Any] = {}
    if blocks is not None:
        number = pad(blocks, (0, max(0, slots - blocks.shape[1])), value=-1)

        def same(row: Any, head: Any, query: Any, slot: Any) -> Any:
            return (number[row, query] == number[row, slot]) & (number[row, query] >= 0)

        functions["or_mask_function"] = same
    if window is not None:
        real = hidden.new_ones(hidden.shape[0], slots, dtype=torch.long) if key_mask is None else key_mask.long()
        rank = pad(real, (0, max(0, slots - real.shape[1])), value=1).cumsum(1)

        def near(row: Any, head: Any, query: Any, slot: Any) -> Any:
            return rank[row, slot] > rank[row, query] - window

        functions["and_mask_function"] = near
    return create_causal_mask(**given, **functions)
