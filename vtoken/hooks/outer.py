"""What only the calls around the language model know: labels, drafts, which positions are visual, which prompts run dense, and when a call
is over."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from vtoken.hooks.flow import eager
from vtoken.hooks.guard import Guard, pictured
from vtoken.hooks.handle import Handle
from vtoken.run import Run


class Outer:
    """Hooks on the model and on `outer` (which sees ids); what they find goes to the run. Nothing on decode steps, which may be compiled.

    Args:
        guard: is told of every prompt with pixels before the vision tower runs.
    """

    def __init__(self, adapter: Any, run: Run, handle: Handle, guard: Guard | None) -> None:
        self.adapter, self.run, self.handle, self.guard = adapter, run, handle, guard
        handle.set(adapter.model, "generate", self._shadow(adapter.model.generate))
        handle.before(adapter.model, self._call)
        handle.before(adapter.outer, self._outer)

    def _shadow(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if self.handle.released:
                return original(inputs, *args, **kwargs)
            ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
            if self.guard is not None and pictured(kwargs) and (ids is not None or embeds is not None):
                self.guard.ahead(ids, embeds, kwargs)
            self.run.begin()
            outermost, self.run.generating = not self.run.generating, True
            try:
                return original(inputs, *args, **kwargs)
            finally:
                if outermost:
                    self.run.generating = False
                    self.run.forget()

        return generate

    def _call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids")
        if ids is None or ids.shape[1] > 1:
            self._asked(kwargs)

    @eager
    def _asked(self, kwargs: dict) -> None:
        wanted = kwargs.get("logits_to_keep")
        self.run.labels = kwargs.get("labels")
        self.run.tail = wanted - 1 if type(wanted) is int and wanted > 1 else 0

    def _outer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Ids cannot be seen any more inside the language model."""
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = embeds if ids is None else ids
        if given is not None and given.shape[1] > 1:
            self._see(ids, embeds, kwargs)

    @eager
    def _see(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> None:
        self.run.begin()
        self.adapter.check_call(kwargs)
        pixels = bool(pictured(kwargs))
        encoded = any(v is not None for v in (kwargs.get("mm_encoder_outputs") or {}).values())
        self.run.visual = self.adapter.visual_kinds(ids, embeds) if pixels or encoded else None
        if pixels and self.guard is not None:
            self.guard.look(self.run.visual, kwargs)
