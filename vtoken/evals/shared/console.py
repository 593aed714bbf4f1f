"""Tables of text on the console."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


def show(title: str, rows: Sequence[Sequence[str]], *, stderr: bool = False) -> None:
    """Prints a table, its head first; 200 columns wide where nobody looks on. `stderr`: there, as what belongs to stdout is something else."""
    head, *lines = rows
    table = Table(*head, title=title, title_justify="left")
    for line in lines:
        table.add_row(*line)
    console = Console(stderr=stderr)
    Console(stderr=stderr, width=None if console.is_terminal else 200).print(table)
