"""What a draft is given of the attention of its target, which has read the prompt before it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.attention_facts import causal_mean
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import text_slots
from vtoken.stages import Fact


class _Recorded(threading.local):
    """Of the calling thread.

    Attributes:
        flow: the target's last prefill; sums: its attention [B, L] per fact, and how many layers are in the sum.
        listening: a `generate` with the draft is at work; asking: the draft reads the prompt.
    """

    flow: PrefillState | None = None
    listening: bool = False
    asking: bool = False

    def __init__(self) -> None:
        self.sums: dict[Fact, tuple[Tensor, int]] = {}

    def forget(self) -> None:
        self.flow, self.sums = None, {}


class TargetAttention:
    """Attention that columns of the prompt receive from the text behind its last image (from its last token, where
    there is none), mean over that text, the heads and the layers.

    Args:
        facts: what the draft's stages ask: `target_attention` from certain layers on.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts, self.recorded = tuple(dict.fromkeys(facts)), _Recorded()

    def observe(self, context: Context) -> None:
        """Taps the decoder of the target."""
        run, config = context.run, context.lm.config
        first = {fact: (fact.layer or 0) % context.depth for fact in self.facts}
        asked = {layer: [fact for fact in self.facts if layer >= first[fact]] for layer in context.attending}

        def function(call: AttentionCall) -> Any:
            if self.recorded.listening and isinstance(run.flow, PrefillState):
                self._record(run.flow, asked[call.layer], call, window_of(config, call.layer))
            return call.original()

        tap(context.handle, context.lm, [layer for layer, facts in asked.items() if facts], function)

    @torch.no_grad()
    def _record(self, flow: PrefillState, facts: Sequence[Fact], call: AttentionCall, window: int | None) -> None:
        recorded = self.recorded
        if recorded.flow is not flow:
            recorded.flow, recorded.sums = flow, {}
        found = received(flow, call.q, call.k[:, :, : flow.slots or flow.index.shape[1]], call.scale, window)
        for fact in facts:
            total, layers = recorded.sums.get(fact, (0, 0))
            recorded.sums[fact] = total + found, layers + 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the target runs with its draft; without it the target's prefills cost nothing more."""
        self.recorded.listening = True
        try:
            yield
        finally:
            self.recorded.listening = False
            self.recorded.forget()

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While the draft reads the prompt that the target has read last."""
        self.recorded.asking = True
        try:
            yield
        finally:
            self.recorded.asking = False
            self.recorded.forget()

    def about(self, flow: PrefillState, fact: Fact) -> Tensor:
        """[ΣN] of the visual tokens that are live in a draft's prefill.

        Raises:
            UnsupportedError: the draft is not called by its target.
        """
        recorded = self.recorded
        if not recorded.asking or fact not in recorded.sums:
            raise UnsupportedError(
                f"{fact.name} is what a target has just read, and this draft runs by itself; call "
                "target.generate(..., assistant_model=draft), or vtoken.unwrap(draft) first"
            )
        total, layers = recorded.sums[fact]
        row, column = (i.to(total.device) for i in (flow.live.batch_row, flow.live.column))
        return (total[row, column] / layers).to(flow.hidden.device)


def received(flow: PrefillState, q: Tensor, k: Tensor, scale: float, window: int | None) -> Tensor:
    """[B, L] attention that the logical columns of a prompt receive in a layer, of queries q [B, H, P, d] and keys
    k [B, Hk, slots, d]; 0 at columns that are gone."""
    past = k.shape[2] - flow.index.shape[1]
    valid = flow.valid.to(q.device)
    key_mask = torch.ones_like(k[:, 0, :, 0], dtype=torch.bool)
    key_mask[:, past:] = valid
    out = q.new_zeros(flow.new.shape, dtype=torch.float32)
    for row, at in enumerate(raters(flow)):
        at = at.to(q.device)
        mean = causal_mean(q[row, :, at], k[row], key_mask[row], at + past, scale, window)[past:]
        out[row].index_add_(0, flow.index[row].to(q.device), mean.masked_fill(~valid[row], 0))
    return out


def raters(flow: PrefillState) -> list[Tensor]:
    """Per row, slots of the text behind its last image; without any, that of the last token of its prompt."""
    text, seen = text_slots(flow), flow.started
    last = torch.full_like(flow.index[:, 0], -1)
    last = last.scatter_reduce(0, seen.batch_row, seen.column.to(last), "amax")
    late = text & (flow.index > last[:, None])
    ends = [flow.index.shape[1] - 1 - n for n in flow.tails]
    return [at if len(at := row.nonzero()[:, 0]) else at.new_tensor([end]) for row, end in zip(late, ends, strict=True)]
