"""Vocabularies of a target and a draft that differ by padding: both mean the same words, and one has further rows after
them. The draft's logits are brought to the target's size before transformers reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import pad

# Embeddings are padded to a multiple of 64, 128, ... 512.
MOST = 511


def words(model: Any) -> int:
    """Rows of a model's vocabulary."""
    found: int = model.config.get_text_config().vocab_size
    return found


def known(ids: Any, own: int) -> Any:
    """Ids [1, L] as a vocabulary of `own` words can read them: ids past its end, which are padding, become word 0.
    What a draft makes of them is a guess like any other."""
    return ids.masked_fill(ids >= own, 0)


def resized_logits(size: int) -> Callable[..., Any]:
    """A forward hook that cuts logits to `size` words, or pads them with the lowest finite value."""

    def resize(module: Any, args: Any, kwargs: Any, out: Any) -> Any:
        if not hasattr(out, "logits"):
            return None
        out.logits = pad(out.logits, (0, size - out.logits.shape[-1]), value=torch.finfo(out.logits.dtype).min)
        return out

    return resize


def one_vocabulary(original: Callable[..., Any], draft: Any) -> Callable[..., Any]:
    """transformers' check of a call of `generate`, without what it checks of an assistant where that is this draft."""

    @wraps(original)
    def check(mode: Any, config: Any, given: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if given.get("assistant_model") is draft:
            given = {name: value for name, value in given.items() if name != "assistant_model"}
        return original(mode, config, given, *args, **kwargs)

    return check
