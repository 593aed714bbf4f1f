"""The trace for people: one line, a table, and for notebooks the pictures with it."""

from __future__ import annotations

import html
from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from vtoken.hooks.state.installed import spans

if TYPE_CHECKING:
    from vtoken.hooks.state.trace import StageTrace, Trace

WIDTH = 100  # columns of the table


def line(trace: Trace) -> str:
    """`1 image: 576 -> 64 at fastervlm; prefill 12.3 ms; cache 67 MB`, tokens of all images together."""
    count = len(trace.visual_tokens)
    steps = [_step(name, list(entries)) for name, entries in groupby(trace.stages, lambda entry: entry.name)]
    parts = [f"{count} image{'s' * (count != 1)}: {', '.join(steps) or f'{sum(trace.visual_tokens)} tokens'}"]
    if trace.dense_rows:
        parts.append(f"rows {spans(trace.dense_rows)} dense")
    if trace.milliseconds:
        parts.append(f"prefill {trace.milliseconds:.1f} ms")
    if size := trace.cache_bytes:
        unit, of = next(((unit, of) for unit, of in (("GB", 1e9), ("MB", 1e6)) if size >= of), ("kB", 1e3))
        parts.append(f"cache {size / of:.3g} {unit}")
    return "; ".join(parts)


def _step(name: str, entries: list[StageTrace]) -> str:
    acted = [entry for entry in entries if entry.stood_aside is None]
    if not acted:
        return f"{name} stood aside"
    before, after = sum(acted[0].tokens_in), sum(acted[-1].tokens_out)
    # Attention drops nothing, and some caches do not tell what they dropped.
    tells = acted[0].site != "attention" and bool(acted[-1].tokens_out)
    return f"{before} -> {after} at {name}" if tells else f"{before} at {name}"


def table(trace: Trace) -> str:
    """The line, and a row per stage; layers at which it did the same share one. Tokens are per image."""
    drawn = Table(
        "stage", "site", "layer", "tokens in", "tokens out", "ms", "note", box=SIMPLE_HEAD, padding=(0, 1, 0, 0)
    )
    alike = groupby(trace.stages, lambda e: (e.name, e.site, e.tokens_in, e.tokens_out, e.stood_aside))
    for (name, site, before, after, aside), group in alike:
        entries = list(group)
        layers = spans([entry.layer for entry in entries if entry.layer is not None])
        spent = sum(entry.milliseconds for entry in entries)
        cells = (name, site, layers, _counts(before), _counts(after), f"{spent:.2f}", aside or _note(entries))
        drawn.add_row(*map(Text, cells))
    console = Console(file=StringIO(), width=WIDTH)
    with console.capture() as text:
        console.print(drawn)
    return "\n".join([line(trace), *(row.rstrip() for row in text.get().rstrip().splitlines())])


def _counts(tokens: list[int]) -> str:
    return ", ".join(map(str, tokens))


def _note(entries: list[StageTrace]) -> str:
    shares = [share for entry in entries for share in entry.density]
    notes = [f"{given} for {asked}" for asked, given in entries[0].substitutes.items()]
    if shares:
        notes.append(f"computes {sum(shares) / len(shares):.0%} of the blocks")
    return ", ".join(notes)


def page(trace: Trace, picture: Any) -> str:
    """HTML of the table, below the picture (a data URI) if there is one."""
    shown = f'<img src="{picture}" alt="kept tokens">' if picture else ""
    return f"{shown}<pre>{html.escape(table(trace))}</pre>"
