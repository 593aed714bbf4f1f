"""Batches padded on the right, as training has them, and pipelines that a family may refuse."""

from __future__ import annotations

import modes
import pytest
import torch
from usual import ALONE

import vtoken
from vtoken.errors import UnsupportedError

# kvpress replaces attention functions of the process: test_kvpress.py.
NAMES = [name for name in ALONE if name != "kvpress"]


# A stage that reads what stands behind an image may find text there or not.
BATCH = [[3, "img", 6], [1, "img", 4], [5]]
SPEAKING = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def right(batch):
    """The same batch, padded on the right; positions count from each row's first token."""
    order = torch.argsort(~batch["attention_mask"].bool(), dim=1, stable=True)
    return {**batch, **{name: batch[name].gather(1, order) for name in SPEAKING if name in batch}}


def with_positions(model, batch):
    """LLaVA numbers columns unless it is told; Qwen numbers tokens."""
    if modes.mrope(model):
        return batch
    return {**batch, "position_ids": (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)}


def wrapped_or_skip(model, pipeline):
    try:
        return vtoken.wrap(model, pipeline)
    except UnsupportedError as error:
        pytest.skip(str(error))
