"""The only writer: every hook and attribute change on a model, and its undo."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_ABSENT = object()
Before = Callable[[nn.Module, tuple, dict], Any]
After = Callable[[nn.Module, tuple, dict, Any], Any]


class Handle:
    """Records what was changed so that `release` leaves the model as it was, attributes and hooks included.

    Attributes:
        switch: what is in place only while a forward needs it.
        installed: (module or other object, what was put there), in order.
        released: `release` was called; functions that replace the model's own then only call those.
    """

    released = False

    def __init__(self) -> None:
        self.switch, self.installed = Switch(), list[tuple[Any, str]]()
        self._undo: list[Callable[[], None]] = [self.switch.clear]

    def before(self, module: nn.Module, hook: Before) -> None:
        """A forward pre-hook `hook(module, args, kwargs) -> None | (args, kwargs)`."""
        self.installed.append((module, _owner(hook)))
        self._undo.append(module.register_forward_pre_hook(hook, with_kwargs=True).remove)

    def after(self, module: nn.Module, hook: After, *, first: bool = False) -> None:
        """A forward hook `hook(module, args, kwargs, output) -> None | output`; `first`: before those that are there
        already."""
        self.installed.append((module, _owner(hook)))
        self._undo.append(module.register_forward_hook(hook, prepend=first, with_kwargs=True).remove)

    def after_child(self, parent: nn.Module, name: str, hook: Callable[[Any], None]) -> None:
        """`hook(output)` after every call of the module that `parent` has under `name`.

        Adapters and quantisation replace that module, before or after this; each forward of `parent` looks it up.
        """
        child = _Child(parent, name, hook)
        self.installed.append((child.module, _owner(hook)))
        self.before(parent, child.follow)
        self._undo.append(child.leave)

    def set(self, target: Any, name: str, value: Any) -> None:
        """Sets an instance attribute. `release` restores the earlier one, or removes it where there was none; what
        somebody else has set since then stays."""
        own = vars(target)
        old = own.get(name, _ABSENT)
        setattr(target, name, value)
        self.installed.append((target, f"attribute {name}"))

        def undo() -> None:
            if own.get(name, _ABSENT) is not value:
                return
            if old is _ABSENT:
                del own[name]
            else:
                setattr(target, name, old)

        self._undo.append(undo)

    @contextmanager
    def during(self, target: Any, name: str, value: Any) -> Iterator[None]:
        """Gives an instance attribute another value while a block runs."""
        old = vars(target)[name]
        setattr(target, name, value)
        try:
            yield
        finally:
            setattr(target, name, old)

    def release(self) -> None:
        """Undoes everything, newest first; safe to call twice.

        Raises:
            ExceptionGroup: what failed; all the rest is undone.
        """
        self.released, failed = True, []
        while self._undo:
            try:
                self._undo.pop()()
            except Exception as error:
                failed.append(error)
        if failed:
            raise ExceptionGroup("some changes could not be taken back", failed)


def _owner(hook: Any) -> str:
    """The class that a hook belongs to, or a function's own name."""
    while isinstance(hook, partial):
        hook = hook.func
    owner = getattr(hook, "__self__", None)
    return getattr(hook, "__qualname__", repr(hook)) if owner is None else type(owner).__name__


class Switch:
    """Instance attributes that are in place while any thread has them on."""

    def __init__(self) -> None:
        self._lock, self._mine, self._threads = threading.Lock(), threading.local(), 0
        self._swaps: list[tuple[dict[str, Any], str, Any, Any]] = []

    def add(self, target: Any, name: str, value: Any) -> None:
        """`value` in place of the instance attribute `name`."""
        self._swaps.append((vars(target), name, value, vars(target)[name]))

    def on(self) -> None:
        """Puts them in place for the calling thread; safe to call twice."""
        if self._swaps and not getattr(self._mine, "on", False):
            self._mine.on = True
            with self._lock:
                self._threads += 1
                for own, name, value, _ in self._swaps:
                    own[name] = value

    def off(self) -> None:
        """The calling thread needs them no more; safe to call twice."""
        if getattr(self._mine, "on", False):
            self._mine.on = False
            with self._lock:
                self._threads -= 1
                if not self._threads:
                    self._restore()

    def clear(self) -> None:
        """Takes them back, for all threads and for good."""
        with self._lock:
            self._restore()
            self._swaps = []

    def _restore(self) -> None:
        for own, name, value, usual in self._swaps:
            if own.get(name) is value:
                own[name] = usual


class _Child:
    """A forward hook that moves to whatever module a parent has under a name."""

    def __init__(self, parent: nn.Module, name: str, hook: Callable[[Any], None]) -> None:
        self.parent, self.name, self.hook = parent, name, hook
        self.module: nn.Module | None = None
        self.follow(parent, (), {})

    def follow(self, parent: nn.Module, args: tuple, kwargs: dict) -> None:
        module = getattr(self.parent, self.name)
        if module is not self.module:
            self.leave()
            self._take_off(module)
            self.module = module
            module.register_forward_hook(self._seen)

    def leave(self) -> None:
        for module in (self.module, getattr(self.parent, self.name)):
            self._take_off(module)
        self.module = None

    def _take_off(self, module: nn.Module | None) -> None:
        """Removes this hook, copies too: quantisation copies hooks to the module that it puts in place of another."""
        hooks = {} if module is None else module._forward_hooks
        for key in [key for key, hook in hooks.items() if hook == self._seen]:
            del hooks[key]

    def _seen(self, module: nn.Module, args: tuple, out: Any) -> None:
        self.hook(out)
