"""What transformers calls the argument, and the field of outputs, that hands the KV cache on."""

from __future__ import annotations

from typing import Any

import transformers
from packaging.version import Version
from torch import Tensor
from transformers.masking_utils import create_causal_mask

FORMER = "past_key_values"  # still taken from callers
CACHE = "cache" if Version(transformers.__version__) >= Version("5.24.dev0") else FORMER


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache that a caller hands to the model, under either name."""
    return kwargs.get(CACHE, kwargs.get(FORMER))


def causal_mask(config: Any, hidden: Tensor, key_mask: Tensor | None, cache: Any) -> Any:
    """What the backend makes of a 2D mask, for hidden states [B, N, D] behind what `cache` holds."""
    named: dict[str, Any] = {CACHE: cache}
    return create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=key_mask, position_ids=None, **named)
