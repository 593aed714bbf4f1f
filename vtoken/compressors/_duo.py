"""DuoAttention's gates: one number per decoder layer and key head, given in the pipeline or in a file."""

from __future__ import annotations

import json
import reprlib
from math import isfinite
from pathlib import Path
from typing import Any

from vtoken.compressors._files import existing

Gates = tuple[tuple[float, ...], ...]


def read(name: str) -> Gates:
    """The gates in a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = existing(Path(name), name, "take a path to JSON [[...], ...] or to the authors' full_attention_heads.tsv")
    table = path.suffix == ".tsv"
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line.split("\t") for line in text.splitlines() if line.strip()]
        rows = [[float(word) for word in line] for line in lines] if table else json.loads(text, parse_int=float)
    except (ValueError, OSError, RecursionError) as error:
        what = "table of numbers with tabs between them" if table else "JSON"
        more = "" if table else "; tables with tabs must be called .tsv"
        raise ValueError(f"{path} is no {what}: {error}{more}") from None
    check(rows, str(path))
    return tuple(tuple(map(float, row)) for row in rows)


def check(rows: Any, what: str) -> None:
    """Refuses anything but one number for every key head of every layer.

    Raises:
        ValueError: names `what`.
    """
    if not isinstance(rows, (list, tuple)) or not all(isinstance(row, (list, tuple)) for row in rows):
        raise ValueError(f"{what} must hold a list per decoder layer, [[0.1, 0.9], [0.4, 0.2], ...]")
    for layer, row in enumerate(rows):
        for x in row:
            if type(x) not in (int, float) or not isfinite(x):
                raise ValueError(f"{what} must hold finite numbers, not {reprlib.repr(x)} in layer {layer}")
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or not widths[0]:
        found = f"layers of {' and '.join(map(str, widths))}" if widths else "no layers"
        raise ValueError(f"{what} must hold equally many numbers for every layer, one per key head, not {found}")
