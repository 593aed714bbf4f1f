"""What a draft that runs on the states of its target is given of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.read_prompt import ReadPicture, ReadPrompt


@dataclass(frozen=True)
class _Entered:
    """A prompt of L columns as it entered the language model.

    Attributes:
        embeds: [L, D] its embeddings, 0 where no token entered.
        real, here: [L] which columns are no padding, and which entered.
        flow: the prefill; None without pictures.
    """

    embeds: Tensor
    real: Tensor
    here: Tensor
    flow: PrefillState | None


class _Recorded(threading.local):
    """Of the calling thread.

    Attributes:
        listening: a `generate` with the draft is at work; begun: its prompt was read.
        entered: a prompt that is being read.
        prompt, hidden: what was read since the draft asked last: the prompt, or last hidden states [n, D] of steps.
    """

    listening: bool = False
    begun: bool = False
    entered: _Entered | None = None
    prompt: ReadPrompt | None = None
    hidden: Tensor | None = None


class TargetStates:
    """Last hidden states of the target, and of its prompt also what entered its language model."""

    def __init__(self) -> None:
        self.recorded = _Recorded()

    def observe(self, context: Context) -> None:
        """Hooks behind all others on the language model: they see what its layers are given, and what it returns."""
        self.run = context.run
        context.handle.before(context.lm, self._before)
        context.handle.after(context.lm, self._after)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the target runs with its draft; without it nothing is kept."""
        recorded = self.recorded
        recorded.listening = True
        try:
            yield
        finally:
            recorded.listening = recorded.begun = False
            recorded.entered = recorded.prompt = recorded.hidden = None

    def taken(self) -> ReadPrompt | Tensor:
        """What the target has read since this was called last: the prompt; from then on last hidden states [n, D]."""
        recorded = self.recorded
        found = recorded.hidden if recorded.prompt is None else recorded.prompt
        assert found is not None, "the target has not run"
        recorded.prompt = recorded.hidden = None
        return found

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.recorded.listening and not self.recorded.begun:
            self._enter(kwargs["inputs_embeds"][0])

    @eager
    def _enter(self, x: Tensor) -> None:
        flow, mask = self.run.flow, self.run.mask
        if isinstance(flow, PrefillState):
            real, here = flow.new[0].to(x.device), flow.index[0, flow.valid[0]].to(x.device)
            embeds = x.new_zeros(len(real), x.shape[1]).index_copy(0, here, x[flow.valid[0].to(x.device)])
            self.recorded.entered = _Entered(embeds, real, torch.zeros_like(real).index_fill(0, here, True), flow)
        else:
            given = isinstance(mask, Tensor) and mask.ndim == 2
            real = mask[0].to(x.device).bool() if given else torch.ones(len(x), dtype=torch.bool, device=x.device)
            self.recorded.entered = _Entered(x, real, real, None)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if self.recorded.listening:
            self._leave(out.last_hidden_state[0])

    @eager
    def _leave(self, hidden: Tensor) -> None:
        recorded = self.recorded
        if recorded.begun:
            recorded.hidden = hidden
        elif recorded.entered is not None:
            recorded.prompt, recorded.entered, recorded.begun = read_prompt(recorded.entered, hidden), None, True


def read_prompt(entered: _Entered, hidden: Tensor) -> ReadPrompt:
    """The prompt, of which the last layer has left `hidden` [L, D]."""
    flow, embeds, real = entered.flow, entered.embeds, entered.real.cpu()
    left = real if flow is None else flow.left()[0].cpu()
    ranks, visual, pictures = real.cumsum(0) - 1, torch.zeros_like(real), []
    if flow is not None:
        visual, piece = pieces(flow, real)
        for each in range(int(piece.max()) + 1):
            whole = visual & (piece == each)
            if len(at := (whole & entered.here.cpu()).nonzero()[:, 0]):
                pictures.append(ReadPicture(embeds[at.to(embeds.device)], int(ranks[whole].max())))
    at = left.nonzero()[:, 0]
    states, entered_as = hidden[at.to(hidden.device)], embeds[at.to(embeds.device)]
    return ReadPrompt(states, entered_as, ranks[at], visual[at], tuple(pictures), int(real.sum()))


def pieces(flow: PrefillState, real: Tensor) -> tuple[Tensor, Tensor]:
    """[L] which columns are parts of pictures, and in which piece of a picture every such column is: one piece ends
    where text or another picture begins."""
    raster, newlines = flow.raster, flow.spans.newlines
    visual, first = torch.zeros_like(real), torch.zeros_like(real)
    columns = raster.column.cpu()
    visual[columns] = True
    if newlines is not None:
        visual[newlines.column.cpu()] = True
    for each in columns.split(list(raster.lengths)):
        if len(each):
            first[each.min()] = True
    visual &= real
    begins = visual & (first | ~visual.roll(1).index_fill(0, torch.tensor([0]), False))
    return visual, begins.cumsum(0) - 1
