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
    """What a prompt of L columns was when it entered the language model: embeddings [L, D] (0 where nothing entered),
    which columns [L] are real and which entered, and the prefill; None without pictures."""

    embeds: Tensor
    real: Tensor
    here: Tensor
    flow: PrefillState | None


class _Heard(threading.local):
    """Of the calling thread; `listening`: a `generate` with the draft is at work, `begun`: its prompt was read."""

    listening: bool = False
    begun: bool = False
    entered: _Entered | None = None
    prompt: ReadPrompt | None = None
    hidden: Tensor | None = None


class TargetStates:
    """Last hidden states of the target, and of its prompt also what entered its language model."""

    def __init__(self) -> None:
        self.heard = _Heard()

    def observe(self, context: Context) -> None:
        """Behind all other hooks on the language model: what is seen is what its layers get, and what it returns."""
        self.run = context.run
        context.handle.before(context.lm, self._before)
        context.handle.after(context.lm, self._after)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While the target runs with its draft; without it nothing is kept."""
        self.heard.listening = True
        try:
            yield
        finally:
            self.heard.listening = self.heard.begun = False
            self.heard.entered = self.heard.prompt = self.heard.hidden = None

    def taken(self) -> ReadPrompt | Tensor:
        """What the target has read since this was asked last: the prompt; from then on last hidden states [n, D]."""
        heard = self.heard
        found, heard.prompt, heard.hidden = (heard.prompt or heard.hidden), None, None
        assert found is not None, "the target has not run"
        return found

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.heard.listening and not self.heard.begun:
            self._enter(kwargs["inputs_embeds"][0])

    @eager
    def _enter(self, x: Tensor) -> None:
        flow, mask = self.run.flow, self.run.mask
        if isinstance(flow, PrefillState):
            real, here = flow.new[0].to(x.device), flow.index[0, flow.valid[0]].to(x.device)
            embeds = x.new_zeros(len(real), x.shape[1]).index_copy(0, here, x[flow.valid[0].to(x.device)])
            self.heard.entered = _Entered(embeds, real, torch.zeros_like(real).index_fill(0, here, True), flow)
        else:
            given = isinstance(mask, Tensor) and mask.ndim == 2
            real = mask[0].to(x.device).bool() if given else torch.ones(len(x), dtype=torch.bool, device=x.device)
            self.heard.entered = _Entered(x, real, real, None)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        if self.heard.listening:
            self._leave(out.last_hidden_state[0])

    @eager
    def _leave(self, hidden: Tensor) -> None:
        heard = self.heard
        if heard.begun:
            heard.hidden = hidden
        elif heard.entered is not None:
            heard.prompt, heard.entered, heard.begun = read_prompt(heard.entered, hidden), None, True


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
    return ReadPrompt(
        hidden[at.to(hidden.device)],
        embeds[at.to(embeds.device)],
        ranks[at],
        visual[at],
        tuple(pictures),
        int(real.sum()),
    )


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
