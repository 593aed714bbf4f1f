"""Progress of a command: a bar on a terminal, elsewhere a line every few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Tell = Callable[[str, float | None], None]
EVERY = 5  # seconds between lines
_telling: list[Tell] = []  # of the command that runs in this process


@contextmanager
def progress(shown: bool = True) -> Iterator[Tell]:
    """Shows what `say` reports, and yields a function that reports likewise. Inside another `progress` the share that
    is done stays the outer one's. Bars of other packages are off.

    Args:
        shown: false in a process for which another one reports.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if _telling:
        yield lambda what, share: _telling[-1](what, None)
        return
    console = Console(stderr=True)
    watched = shown and console.is_terminal
    columns = TextColumn("{task.description:<20}"), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    with terminal_only(False), Progress(*columns, console=console, transient=True, disable=not watched) as bar:
        task = bar.add_task("loading", total=1.0)
        lines = _lines() if shown and not watched else None
        _telling.append(lines or (lambda what, share: bar.update(task, description=what, completed=share)))
        try:
            yield _telling[-1]
        finally:
            _telling.pop()


def say(what: str, share: float | None = None) -> None:
    """Reports what is being done and which share of the whole is done, if a command is running that shows it."""
    if _telling:
        _telling[-1](what, share)


def mute() -> None:
    """Silences this process."""
    from tqdm import tqdm

    _telling[:] = [lambda what, share: None]
    _silence(tqdm)


def _lines() -> Tell:
    start = time.monotonic()
    said, reached = start, 0.0

    def tell(what: str, share: float | None) -> None:
        nonlocal said, reached
        now, reached = time.monotonic(), reached if share is None else share
        if now - said >= EVERY:
            said = now
            print(f"{now - start:4.0f} s  {reached:4.0%}  {what}", file=sys.stderr, flush=True)

    return tell


@contextmanager
def terminal_only(shown: bool | None = None) -> Iterator[None]:
    """While a block runs, bars of transformers, datasets and lmms-eval, which are all tqdm's, are shown or not; None:
    where stderr is a terminal."""
    from tqdm import tqdm

    stock = tqdm.__init__
    if not (sys.stderr.isatty() if shown is None else shown):
        _silence(tqdm)
    try:
        yield
    finally:
        tqdm.__init__ = stock


def _silence(tqdm: Any) -> None:
    """No bars, also where a package asks for one: environment variables change the default only."""
    stock = tqdm.__init__
    tqdm.__init__ = lambda self, *given, **named: stock(self, *given, **{**named, "disable": True})
