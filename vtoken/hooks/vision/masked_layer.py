"""Makes a layer that hands its attention no mask take one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import wraps
from typing import Any

from torch import Tensor, nn

from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.handle import Handle

Run = Callable[..., Any]


class MaskedLayer:
    """The layer's forward takes `attention_mask`, and its attention gets it, also where gradient checkpointing runs
    the layer again, in whatever thread."""

    def __init__(self, handle: Handle, layer: Any, attention: str) -> None:
        self.handle, self.local = handle, threading.local()
        handle.set(layer, "forward", self._shadow(layer, layer.forward))
        handle.before(getattr(layer, attention), self._give)

    def _shadow(self, layer: Any, original: Run) -> Run:
        @wraps(original)
        def forward(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            if attention_mask is None:
                return original(*args, **kwargs)
            if not replays(layer):
                return self._masked(original, attention_mask)(*args, **kwargs)
            # The forward checkpoints what it does within itself, and that is what has to know the mask.
            checkpoint = layer._gradient_checkpointing_func

            def masked(run: Run, *inputs: Any) -> Any:
                return checkpoint(self._masked(run, attention_mask), *inputs)

            with self.handle.during(layer, "_gradient_checkpointing_func", masked):
                return original(*args, **kwargs)

        return forward

    def _masked(self, run: Run, mask: Tensor) -> Run:
        """`run`, during which `_give` hands attention the mask."""

        def masked(*args: Any, **kwargs: Any) -> Any:
            self.local.mask = mask
            try:
                return run(*args, **kwargs)
            finally:
                self.local.mask = None

        return masked

    def _give(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        mask = getattr(self.local, "mask", None)
        return None if mask is None else (args, {**kwargs, "attention_mask": mask})
