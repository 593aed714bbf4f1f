"""What a draft is told of the attention of its target, which has read the prompt before it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.attention_facts import causal_mean
from vtoken.hooks.decoder.attention_tap import tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import text_slots
from vtoken.stages import Fact


class _Heard(threading.local):
    """Of the calling thread: the prefill that is at work, sums of attention [B, L] per fact and how many layers are in
    them; `listening`: a `generate` with the draft is at work, `asking`: the draft reads the prompt."""

    flow: PrefillState | None = None
    listening: bool = False
    asking: bool = False

    def __init__(self) -> None:
        self.sums: dict[Fact, tuple[Tensor, int]] = {}


class TargetAttention:
    """Attention that columns of the prompt receive from the text behind its last image (from its last token, where
    there is none), mean over that text, the heads and the layers.

    Args:
        facts: what the draft's stages ask: `target_attention` from certain layers on.
    """

    def __init__(self, facts: Sequence[Fact]) -> None:
        self.facts, self.heard = tuple(dict.fromkeys(facts)), _Heard()

    def observe(self, context: Context) -> None:
        """Taps the decoder of the target."""
        depth, run, config = context.depth, context.run, context.lm.config
        first = {fact: (fact.layer or 0) % depth for fact in self.facts}
        self.asked = {
            layer: [fact for fact in self.facts if layer >= first[fact]]
            for layer in context.attending
            if any(layer >= each for each in first.values())
        }

        def function(
            module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
        ) -> Any:
            scale = kwargs.get("scaling") or k.shape[-1] ** -0.5
            self._hear(run.flow, module.layer_idx, q, k, scale, window_of(config, module.layer_idx))
            return original()

        tap(context.handle, context.lm, self.asked, function)

    @eager
    @torch.no_grad()
    def _hear(self, flow: Any, layer: int, q: Tensor, k: Tensor, scale: float, window: int | None) -> None:
        heard = self.heard
        if not heard.listening or not isinstance(flow, PrefillState):
            return
        if heard.flow is not flow:
            heard.flow, heard.sums = flow, {}
        found = received(flow, q, k[:, :, : flow.slots or flow.index.shape[1]], scale, window)
        for fact in self.asked[layer]:
            total, layers = heard.sums.get(fact, (0, 0))
            heard.sums[fact] = total + found, layers + 1

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the target runs with its draft; without it the target's prefills cost nothing more."""
        self.heard.listening = True
        try:
            yield
        finally:
            self.heard.listening, self.heard.flow, self.heard.sums = False, None, {}

    @contextmanager
    def asking(self) -> Iterator[None]:
        """While the draft reads the prompt that the target has read last."""
        self.heard.asking = True
        try:
            yield
        finally:
            self.heard.asking, self.heard.flow, self.heard.sums = False, None, {}

    def about(self, flow: PrefillState, fact: Fact) -> Tensor:
        """[ΣN] of the visual tokens that are live in a draft's prefill.

        Raises:
            UnsupportedError: the draft is not called by its target.
        """
        heard = self.heard
        if not heard.asking or fact not in heard.sums:
            raise UnsupportedError(
                f"{fact.name} is what a target has just read, and this draft runs by itself; call "
                "target.generate(..., assistant_model=draft), or vtoken.unwrap(draft) first"
            )
        total, layers = heard.sums[fact]
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
