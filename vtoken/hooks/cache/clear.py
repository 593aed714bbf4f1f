"""A cut inside the decoder also removes the tokens that it drops from the caches of earlier layers.

Those layers have attended by then, so the first new token is unchanged; later ones see nothing that was dropped.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.layer_kinds import SLIDING, kinds_of, other_kinds
from vtoken.hooks.state.left_padding import SlotLayout, take
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.stages import Stage


def check_cleared(stages: Sequence[Stage], config: Any) -> None:
    """Refuses a cut that clears the caches of earlier layers where these do not hold the prompt token by token.

    Args:
        stages: of the pipeline; config: of the decoder.

    Raises:
        UnsupportedError: names the stage, the reason and what to do.
    """
    why = [f"{stage.name} leaves every head of them other tokens" for stage in stages if stage.site == "cache"]
    if SLIDING in kinds_of(config):
        why = [f"sliding windows of {config.model_type!r} hold {config.sliding_window - 1} tokens at most"]
    for stage in stages:
        if why and stage.clears_earlier_layers():
            raise UnsupportedError(
                f"stage {stage.name} takes what it drops out of the caches of earlier layers, and {why[0]}; "
                "set retroactive: false"
            )


def check_clearing(stage: Stage, flow: PrefillState, attending: Collection[int]) -> None:
    """Refuses a prefill whose tail has already read what the cut removes from earlier layers, and caches that cannot
    lose slots.

    Raises:
        UnsupportedError: says what to do.
    """
    without = "retroactive: false leaves them as they are"
    if any(flow.tails):
        raise UnsupportedError(
            f"stage {stage.name} takes what it drops out of the caches of earlier layers too, and tokens after the "
            f"prompt (drafts, or an answer to score) have read them by then; {without}"
        )
    if flow.cache is None or flow.cache.is_compileable:
        return
    if odd := other_kinds(flow.cache, attending):
        raise UnsupportedError(
            f"stage {stage.name} cannot take slots out of cache layers of kind {odd}; use a plain DynamicCache "
            f"({without})"
        )


def clear_earlier(flow: PrefillState, attending: Collection[int]) -> None:
    """Removes from the layers before `flow.clears` the slots of this prefill that the cut at that layer dropped. A
    static cache keeps its size, and these slots are hidden."""
    cache, cut, last = flow.cache, flow.layouts[flow.clears], flow.pending_slots.get(flow.clears)
    if last is None:
        return  # no cache
    starts = sorted(start for start in flow.layouts if start < flow.clears)
    for start, end in zip(starts, [*starts[1:], flow.clears], strict=True):
        layout, slots = flow.layouts[start], flow.pending_slots[start]
        if cache.is_compileable:
            logical = layout.logical.masked_fill(~_stays(layout, cut, flow.new), -1)
        else:
            at = _slots_in(layout, cut, flow.new.shape[1])
            for cached in (cache.layers[k] for k in range(start, end) if k in attending):
                cached.keys, cached.values = (
                    _moved(t, at, layout.index.shape[1]) for t in (cached.keys, cached.values)
                )
            before = layout.logical[:, : layout.logical.shape[1] - layout.index.shape[1]]
            logical = torch.cat([before, cut.logical[:, -cut.index.shape[1] :].to(before.device)], 1)
        flow.pending_slots[start] = replace(slots, logical=logical, dense=slots.dense and last.dense)
    if len(cache.groups) == 1 and not cache.is_compileable and not flow.renumbers:
        # All of them hold the same from here on: one group, whose decode steps are the model's own.
        for start in (*starts[1:], flow.clears):
            del flow.pending_slots[start]


def _slots_in(layout: SlotLayout, cut: SlotLayout, length: int) -> Tensor:
    """[B, P'] slot in the earlier layout of every slot of the later one."""
    slots = torch.arange(layout.index.shape[1], device=layout.index.device).expand_as(layout.index)
    return layout.index.new_zeros(len(layout.index), length).scatter(1, layout.index, slots).gather(1, cut.index)


def _moved(t: Tensor, at: Tensor, width: int) -> Tensor:
    """[B, H, S + P', d] of keys or values [B, H, S + P, d], of whose last P = `width` slots only `at` [B, P'] stay."""
    past = t.shape[2] - width
    return torch.cat([t[:, :, :past], take(t[:, :, past:].transpose(1, 2), at, 1).transpose(1, 2)], 2)


def _stays(layout: SlotLayout, cut: SlotLayout, new: Tensor) -> Tensor:
    """[B, S + P] which slots of the earlier layout hold earlier turns, or tokens that the later layout still has."""
    left = torch.zeros_like(new, dtype=torch.bool).scatter(1, cut.index, cut.valid.bool())
    now = left.gather(1, layout.index)
    before = now.new_ones(len(now), layout.logical.shape[1] - now.shape[1])
    return torch.cat([before, now], 1).to(layout.logical.device)
