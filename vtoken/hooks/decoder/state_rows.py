"""Layers that keep a state, where rows of a later turn are padded.

Padding in front of a prompt is zeroed by the model and leaves a state at zero. Behind an earlier turn it would make the
state decay and push real tokens out of the convolution's window; so there such a layer is given each row by itself,
without padding.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState, eager, steps
from vtoken.hooks.state.pruned_cache import PrunedCache

STATES = ("conv_states", "recurrent_states")


class StateRows:
    """Shadows the forward of every decoder layer without attention; nothing on decode steps, which may be compiled."""

    def __init__(self, context: Context) -> None:
        self.run, self.handle = context.run, context.handle
        for k, layer in enumerate(context.lm.layers):
            if k not in context.attending:
                context.handle.set(layer, "forward", partial(self._forward, k, layer.forward))

    def _forward(self, k: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0] if args else kwargs["hidden_states"]
        if self.handle.released or steps(hidden, kwargs.get(CACHE)):
            return original(*args, **kwargs)
        return self._several(k, original, args, kwargs)

    @eager
    def _several(self, k: int, original: Callable[..., Tensor], args: tuple, kwargs: dict) -> Tensor:
        flow, cache = self.run.flow, kwargs.get(CACHE)
        padded = isinstance(flow, ForwardState) and flow.past and flow.key_mask is not None
        if not padded or not isinstance(cache, PrunedCache):
            return original(*args, **kwargs)
        rows = flow.real_slots()
        hidden = args[0] if args else kwargs["hidden_states"]
        if all(len(at) == hidden.shape[1] for at in rows):
            return original(*args, **kwargs)
        if args:
            args, kwargs = args[1:], {"hidden_states": hidden, **kwargs}
        out = hidden.clone()
        for row, at in enumerate(rows):
            if len(at):
                slots, state = at.to(hidden.device), row_of(cache.layers[k], row)  # type: ignore[attr-defined]
                alone = original(*args, **of_row(kwargs, row, slots, with_layer(cache, k, state)))
                out[row, slots] = alone[0]
                put_back(cache.layers[k], state, row)  # type: ignore[attr-defined]
        return out


def of_row(kwargs: dict, row: int, slots: Tensor, cache: Any) -> dict:
    """A layer's arguments for the slots [n] of one row, all of them real."""
    hidden, rope = kwargs["hidden_states"], kwargs.get("position_embeddings")
    new = {"hidden_states": hidden[row : row + 1, slots], "attention_mask": None, "position_ids": None, CACHE: cache}
    if rope is not None:
        new["position_embeddings"] = tuple(t[(row if len(t) > 1 else 0), slots.to(t.device)][None] for t in rope)
    return {**kwargs, **new}


def row_of(cached: Any, row: int) -> Any:
    """A copy of a cache layer, with the state of one row."""
    alone = copy.copy(cached)
    vars(alone).update({name: copy.copy(x) for name, x in vars(cached).items() if isinstance(x, dict)})
    for name in STATES:
        states = getattr(alone, name)
        states.update({i: None if x is None else x[row : row + 1].clone() for i, x in states.items()})
    return alone


def put_back(cached: Any, alone: Any, row: int) -> None:
    """Writes the state of a row where it was taken from."""
    for name in STATES:
        for i, x in getattr(alone, name).items():
            if x is not None:
                getattr(cached, name)[i][row] = x[0]


def with_layer(cache: Any, k: int, layer: Any) -> Any:
    """The cache with another layer k."""
    view = copy.copy(cache)
    view.layers = [*cache.layers[:k], layer, *cache.layers[k + 1 :]]
    return view
