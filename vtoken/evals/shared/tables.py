"""Tables and numbers as text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

Rows = Sequence[Sequence[str]]
Columns = Mapping[str, Callable[[Any], str]]  # head -> cell of an item


def table(columns: Columns, items: Iterable[Any]) -> list[tuple[str, ...]]:
    """Head and rows as text, a row per item."""
    return [tuple(columns), *(tuple(cell(item) for cell in columns.values()) for item in items)]


def or_na(value: Any, form: str = "") -> str:
    """The value as text, "n/a" for None."""
    return "n/a" if value is None else format(value, form)


def show(title: str, rows: Rows, *, stderr: bool = False, width: int = 200, lines: bool = False) -> None:
    """Prints a table, head first.

    Args:
        stderr: print it there, where stdout is for something else.
        width: columns where no terminal limits them.
        lines: between all rows.
    """
    head, *body = rows
    table = Table(*head, title=title, title_justify="left", show_lines=lines)
    for row in body:
        table.add_row(*row)
    console = Console(stderr=stderr)
    Console(stderr=stderr, width=None if console.is_terminal else width).print(table)


def markdown(rows: Rows, numbers: bool = False) -> str:
    """A Markdown table, head first; `numbers` aligns all columns but the first to the right."""
    head, *body = rows
    rule = ["---", *["---:" if numbers else "---"] * (len(head) - 1)]
    lines = [head, rule, *([cell.replace("|", "\\|") for cell in row] for row in body)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def scaled(value: float, unit: str = "", form: str = ".3g") -> str:
    """A number with a decimal prefix: 3.91 T, 336 MB."""
    power = max(p for p in range(6) if p == 0 or value >= 1000**p)
    return f"{value / 1000**power:{form}} {' kMGTP'[power].strip()}{unit}".rstrip()
