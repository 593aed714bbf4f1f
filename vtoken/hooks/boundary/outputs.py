"""Outputs of the language model in the shape of the prompt: tokens at their own columns, zeros where one was
dropped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from vtoken.hooks.state.left_padding import SlotLayout
from vtoken.hooks.state.prefill_state import PrefillState


def restore(out: Any, flow: PrefillState, depth: int, attending: Sequence[int]) -> None:
    """Gives hidden states and attention weights of a pruned prefill their full length, in place.

    Args:
        out: what the language model of `depth` layers returns, of which those `attending` have attention weights.
    """
    length, hidden = flow.new.shape[1], out.last_hidden_state
    full = flow.layouts[flow.group].restore(hidden, length)
    # Where a prompt ends in a picture and its last token was dropped, the last one that is left speaks for it.
    full[:, -1] = torch.where(flow.new[:, -1:].to(hidden.device), hidden[:, -1], full[:, -1])
    out.last_hidden_state = full
    states, maps = getattr(out, "hidden_states", None), getattr(out, "attentions", None)
    if states is not None:
        # The first is what enters layer 0, the last is `last_hidden_state`.
        layouts = [_of_layer(flow, max(0, k - 1)) for k in range(depth)]
        inner = [None if x is None else at.restore(x, length) for x, at in zip(states[:depth], layouts, strict=False)]
        last = [full if x is hidden else x for x in states[depth:]]
        out.hidden_states = (*inner, *last)
    if maps is not None:
        out.attentions = tuple(
            None if x is None else _of_layer(flow, k).restore_map(x, length, flow.past)
            for k, x in zip(attending, maps, strict=True)
        )


def _of_layer(flow: PrefillState, k: int) -> SlotLayout:
    return flow.layouts[max(start for start in flow.layouts if start <= k)]
