"""What benchmarks/RESULTS.md and docs/accuracy.md say about a method: rows of their tables."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
# Sections of RESULTS.md that tell accuracies on the reference models, by the beginning of their headings.
SECTIONS = (
    "2026-11-20: every method on the reference model",
    "2026-11-20 and 21: all methods before the LLM",
    "2026-11-20: merging, unmerging, exits and second stages",
    "2026-11-21: what acts inside the encoder, the decoder and the cache",
    "2026-11-21: the same on tiny-llava-next and tiny-qwen2.5-vl",
    "2026-11-21: what acts inside the decoder, on tiny-llava-next",
)
ROW = re.compile(r"^\|.*\|$")


class Table(NamedTuple):
    """A table of RESULTS.md: its section's heading, the line above it where that ends in a colon, its lines."""

    heading: str
    label: str
    lines: list[str]


@cache
def tables() -> list[Table]:
    """The tables of SECTIONS, in order."""
    found: list[Table] = []
    for section in re.split(
        r"^## ", (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )[1:]:
        heading, _, text = section.partition("\n")
        if not heading.startswith(SECTIONS):
            continue
        label = ""
        for block in re.split(r"\n\n+", text.strip()):
            lines = [line for line in block.split("\n") if ROW.match(line)]
            if lines:
                found.append(Table(heading, label, lines))
            label = block.partition("\n")[0] if block.endswith(":") or block.startswith("Percent of dense") else ""
    missing = [start for start in SECTIONS if not any(table.heading.startswith(start) for table in found)]
    assert not missing, f"RESULTS.md has no section that begins with {missing[0]!r}"
    return found


def rows_of(names: set[str]) -> list[str]:
    """The rows about a stage or its presets, under their heads, with a link to the section."""
    found = []
    for table in tables():
        rows = [line for line in table.lines[2:] if _about(line, names)]
        if rows:
            anchor = slug(table.heading)
            source = f"[{table.heading.replace('`', '')}](../results.md#{anchor})"
            label = f". {table.label.rstrip(':')}" if table.label else ""
            found.append(f"{source}{label}\n\n" + "\n".join([*table.lines[:2], *rows]))
    return found


def slug(heading: str) -> str:
    """The anchor that Python-Markdown gives a heading; the strict build says where it is not."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading.encode("ascii", "ignore").decode()).strip().lower())


def published(name: str) -> bool:
    """Whether docs/accuracy.md has figures of papers for the stage."""
    text = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").partition("## Published")[2]
    rows = [line for line in text.split("\n") if re.match(rf"\| {name}\b", line)]
    return any(re.search(r"\d", line) for line in rows)


def _about(line: str, names: set[str]) -> bool:
    """Whether the first cell names one of them, as `tome:r=96`, `vtw, layer 3` or `dymu-mid-tiny-llava` do."""
    cell = line.split("|")[1]
    return bool(names & {*re.findall(r"[a-z][\w-]*", cell.partition(", for comparison")[0])})
