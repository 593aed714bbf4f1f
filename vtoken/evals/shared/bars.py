"""transformers' progress bars: on a terminal, where a large model takes minutes, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def terminal_only(shown: bool | None = None) -> Iterator[None]:
    """Bars of loading and downloading for the length of a `with`: where stderr is a terminal, or as `shown` says."""
    from transformers.utils import logging

    before = logging.is_progress_bar_enabled()
    if shown if shown is not None else sys.stderr.isatty():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if before:
            logging.enable_progress_bar()
