"""The only writer: every hook and attribute change on a model, and its undo."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

_ABSENT = object()


class Handle:
    """Records what was changed so that `release` leaves the model as it was, attributes and hooks included."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], None]] = []

    def before(self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict], Any]) -> None:
        """A forward pre-hook `hook(module, args, kwargs) -> None | (args, kwargs)`."""
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(
        self, module: nn.Module, hook: Callable[[nn.Module, tuple, dict, Any], Any], *, first: bool = False
    ) -> None:
        """A forward hook `hook(module, args, kwargs, output) -> None | output`; `first`: before those that are there already."""
        self._undo.append(module.register_forward_hook(hook, prepend=first, with_kwargs=True).remove)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Sets an instance attribute; undone to the earlier instance attribute, or to none at all."""
        old = vars(target).get(name, _ABSENT)
        setattr(target, name, value)

        def undo() -> None:
            if old is _ABSENT:
                vars(target).pop(name, None)
            else:
                setattr(target, name, old)

        self._undo.append(undo)

    def release(self) -> None:
        """Undoes everything, newest first; safe to call twice."""
        while self._undo:
            self._undo.pop()()
