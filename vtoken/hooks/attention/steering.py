"""Stages that change what attention gives, in a prompt and at every step. They are given where pictures are among the
slots, and which queries stand behind them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vtoken.errors import UnsupportedError
from vtoken.hooks.attention.steering_checks import acting, check_call
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState, eager
from vtoken.hooks.state.live_tokens import trace_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import text_columns
from vtoken.hooks.state.pruned_cache import Marks, PrunedCache
from vtoken.hooks.state.run import Clock
from vtoken.stages.steering import SteeredAttention, SteeredLayer


@dataclass(frozen=True)
class Seen:
    """What the slots of a layer group hold in one forward; `logical` [B, S], the others as in SteeredLayer."""

    logical: Tensor
    visual: Tensor
    behind: Tensor
    real: Tensor | None
    images: tuple[tuple[int, Tensor], ...]


@dataclass
class Steered:
    """One forward, as the stages see it.

    Attributes:
        marks: of all that is cached after the forward.
        behind: [B, L] new logical columns of text after a picture; prompt: [B, L] those of a prompt with pictures.
        hidden: what entered the layer at work, where a stage asks.
        seen: (first layer of a group, device) -> what its slots hold.
    """

    marks: Marks
    behind: Tensor
    prompt: Tensor | None = None
    hidden: Tensor | None = None
    seen: dict[tuple[int, torch.device], Seen] = field(default_factory=dict)


class Steering:
    """Hooks on the language model, inside those of the boundary, and a tap on the layers in which stages act; installs
    nothing without one."""

    def __init__(self, context: Context) -> None:
        self.run, self.lm, self.stages = context.run, context.lm, context.steering
        if not self.stages:
            return
        context.handle.before(self.lm, self._enter)
        context.handle.after(self.lm, self._leave, first=True)
        for stage in self.stages:
            layers = acting(stage, context.depth, context.attending)
            for k in layers if stage.read_hidden else ():
                context.handle.before(self.lm.layers[k], self._remember)
            tap(context.handle, self.lm, layers, partial(self._tap, stage))

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.run.flow is not None:
            self._open(self.run.flow)

    @eager
    def _open(self, flow: ForwardState) -> None:
        marks = flow.cache.marks if isinstance(flow.cache, PrunedCache) else None
        if not isinstance(flow, PrefillState):
            if marks is not None:
                shown = marks.visual.any(1, keepdim=True)
                flow.steered = Steered(marks, shown.to(flow.new.device) & flow.new)
            return
        if flow.skip_reason is not None:
            for stage in self.stages:
                flow.skip(stage, flow.skip_reason)
        if flow.logical is None:
            return  # nothing is done to this prompt
        self._check(flow.cache)
        new = pictured(flow)
        old = new.new_zeros(len(new), 0) if marks is None else marks.visual.to(new.device)
        old = pad(old, (0, flow.past - old.shape[1]))
        text, prompt = text_columns(flow), flow.new
        if flow.answer is not None:
            text, prompt = text | flow.answer, prompt & ~flow.answer
        behind = text & (old.any(1, keepdim=True) | (new.cumsum(1) > 0))
        marks = Marks(torch.cat([old, new], 1), {} if marks is None else dict(marks.by_layer))
        flow.steered = Steered(marks, behind, prompt & new.any(1, keepdim=True))

    def _check(self, cache: Any) -> None:
        """Refuses a prompt that cannot be steered.

        Raises:
            UnsupportedError: says why, and what to do.
        """
        names = " and ".join(stage.name for stage in self.stages)
        if cache is not None and cache.is_compileable:
            raise UnsupportedError(
                f"stage {names} acts at every step, and steps on a static cache are the model's own, which may be "
                "compiled: leave cache_implementation out"
            )
        if replays(self.lm.layers[0]):
            raise UnsupportedError(
                f"stage {names} changes attention, and gradient checkpointing runs layers again when what it knew is "
                "gone: call model.gradient_checkpointing_disable(), or take the stage out"
            )

    def _leave(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        flow = self.run.flow
        if isinstance(flow, PrefillState) and flow.steered is not None and isinstance(flow.cache, PrunedCache):
            flow.cache.marks = flow.steered.marks

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if isinstance(self.run.flow, PrefillState) and self.run.flow.steered is not None:
            self.run.flow.steered.hidden = args[0] if args else kwargs["hidden_states"]

    def _tap(self, stage: SteeredAttention, call: AttentionCall) -> Any:
        flow = self.run.flow
        if flow is None or flow.steered is None:
            return call.original()
        check_call(stage, call)
        with Clock(call.q.device) as clock:
            out = stage.steer(layer_for(stage, flow, call))
        if isinstance(flow, PrefillState) and flow.skip_reason is None:
            live = flow.live
            flow.trace.stages.append(trace_of(stage, live.lengths, live.history, clock, call.layer))
        return call.original() if out is None else (out, None)


def layer_for(stage: SteeredAttention, flow: ForwardState, call: AttentionCall) -> SteeredLayer:
    """The layer as the stage is given it. Asks the stage for its marks first, where it makes them in this layer."""
    steered: Steered = flow.steered
    key = flow.group, call.q.device
    if key not in steered.seen:
        steered.seen[key] = seen_by(flow, call.q.device)
    seen, by = steered.seen[key], stage.marked_by(call.layer)
    layer = SteeredLayer(
        call.q,
        call.k,
        call.v,
        lambda q, k, v: call.attend(q, k, v, call.mask)[0],
        call.scale,
        call.layer,
        seen.visual,
        seen.behind,
        seen.real,
        seen.images,
        steered.hidden,
    )
    if by == call.layer and steered.prompt is not None and seen.images:
        note(flow, stage, by, stage.mark(layer))
    marked = None if by is None else steered.marks.by_layer.get((stage.name, by))
    return layer if marked is None else replace(layer, marked=at(marked, seen.logical))


def pictured(flow: PrefillState) -> Tensor:
    """[B, L] visual tokens of the rows that do not run dense."""
    new, started = torch.zeros_like(flow.new), flow.started
    new[started.batch_row, started.column] = flow.skip_reason is None
    if flow.skipped:
        new[list(flow.skipped)] = False
    return new


def seen_by(flow: ForwardState, device: torch.device) -> Seen:
    """What the slots of the current layer group hold."""
    steered = flow.steered
    images: tuple[tuple[int, Tensor], ...] = ()
    if isinstance(flow, PrefillState):
        assert flow.logical is not None
        logical, live = flow.logical, flow.live
        if flow.skip_reason is None:
            columns = flow.slot()[1].to(device).split(live.lengths)
            images = tuple((r, c) for r, c in zip(live.row, columns, strict=True) if r not in flow.skipped and len(c))
    else:
        old = flow.cached_rows(flow.group)[0]
        now = torch.where(flow.valid, flow.index + flow.past, -1)
        logical = torch.cat([old, now.to(old.device)], 1)
    logical = logical.to(device)
    behind = steered.behind.gather(1, flow.index) & flow.valid
    real = None if flow.key_mask is None else flow.key_mask.bool().to(device)
    return Seen(logical, at(steered.marks.visual, logical), behind.to(device), real, images)


def at(marks: Tensor, logical: Tensor) -> Tensor:
    """[B, S] marks [B, n] at logical positions [B, S]; False at padding (-1) and from position n on."""
    marks = pad(marks.to(logical.device), (0, 1))
    return marks.gather(1, torch.where(logical < 0, marks.shape[1] - 1, logical.clamp(max=marks.shape[1] - 1)))


def note(flow: ForwardState, stage: SteeredAttention, number: int, said: Tensor) -> None:
    """Keeps the marks of a stage on the slots [B, P] of a prompt, by logical position.

    Raises:
        ValueError: they are not bool [B, P].
    """
    if said.shape != flow.index.shape or said.dtype != torch.bool:
        raise ValueError(
            f"stage {stage.name} marked {said.dtype} {tuple(said.shape)}; it must be bool {tuple(flow.index.shape)}"
        )
    steered: Steered = flow.steered
    assert steered.prompt is not None
    said = said.to(flow.index.device) & flow.valid
    new = torch.zeros_like(flow.new).scatter(1, flow.index, said) & steered.prompt
    old = steered.marks.by_layer.get((stage.name, number), new[:, :0]).to(new.device)
    steered.marks.by_layer[stage.name, number] = torch.cat([pad(old, (0, flow.past - old.shape[1])), new], 1)
