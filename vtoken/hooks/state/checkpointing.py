"""Layers that the backward pass runs a second time."""

from __future__ import annotations

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from vtoken.errors import UnsupportedError


def replays(layer: nn.Module) -> bool:
    """Whether the backward pass will run this layer again (gradient checkpointing)."""
    return layer.training and bool(getattr(layer, "gradient_checkpointing", False))


def check_replay(layer: nn.Module) -> None:
    """Refuses gradient checkpointing that recomputes a layer with its hooks, whose state is gone by then.

    Raises:
        UnsupportedError: the backward pass would recompute this layer like that.
    """
    if "__call__" in vars(GradientCheckpointingLayer) and replays(layer):
        raise UnsupportedError(
            "gradient checkpointing of this transformers version (before 5.21) recomputes layers with their hooks, so "
            "stages between layers would be lost in the backward pass; call model.gradient_checkpointing_disable(), "
            "upgrade transformers, or use stages of site tokens only"
        )
