"""MoA's plans: how wide the window of every decoder layer and head is, as a rule of the prompt's length."""

from __future__ import annotations

import json
import reprlib
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from vtoken.compressors._files import existing

Plan = tuple[tuple[tuple[float, float], ...], ...]  # layer, head: alpha and beta of a window of alpha + beta * N
FORMS = '{"0": {"0": [alpha, beta], ...}, ...} or {"alphas": [[...], ...], "betas": [[...], ...]}'
UNIT = 64  # a window is whole blocks of so many tokens


def read(name: str) -> Plan:
    """The plan in a JSON file, by layer and head or as the authors write it.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = existing(Path(name), name, f"take a path to JSON {FORMS}")
    try:
        told = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(told, dict) or not told:
        raise ValueError(f"{path} must hold {FORMS}")
    if set(told) != {"alphas", "betas"}:
        return _checked(_table(told, str(path)), path)
    alphas, betas = (_table(told[name], f"{path}, {name}") for name in ("alphas", "betas"))
    if [len(row) for row in alphas] != [len(row) for row in betas]:
        raise ValueError(f"{path} must hold as many betas as alphas in every layer")
    return _checked([[*zip(*pair, strict=True)] for pair in zip(alphas, betas, strict=True)], path)


def _table(told: Any, what: str) -> list[list[Any]]:
    """What it holds per layer and head."""
    return [_entries(row, f"{what}, layer {k}") for k, row in enumerate(_entries(told, what))]


def _entries(told: Any, what: str) -> list[Any]:
    """The values of a list, or of an object whose keys number them from 0 on."""
    if isinstance(told, list):
        return told
    if not isinstance(told, dict) or set(told) != {str(k) for k in range(len(told))}:
        raise ValueError(f"{what} must hold one entry after the other, from 0 on: {FORMS}")
    return [told[str(k)] for k in range(len(told))]


def _checked(rows: list[list[Any]], path: Path) -> Plan:
    for layer, row in enumerate(rows):
        for head, pair in enumerate(row):
            fits = isinstance(pair, (list, tuple)) and len(pair) == 2
            if not fits or not all(type(x) is float and isfinite(x) for x in pair):
                raise ValueError(
                    f"{path} must hold two finite numbers, alpha and beta, not {reprlib.repr(pair)} at layer {layer}, "
                    f"head {head}"
                )
    widths = sorted({len(row) for row in rows})
    if len(widths) != 1 or not widths[0]:
        found = f"layers of {' and '.join(map(str, widths))}" if widths else "no layers"
        raise ValueError(f"{path} must hold equally many heads for every layer, not {found}")
    return tuple(tuple((alpha, beta) for alpha, beta in row) for row in rows)


def windows(plan: Plan, layer: int, length: int) -> list[int]:
    """Tokens that each head's queries read of a prompt of this length, themselves included: whole blocks, at least
    one."""
    return [max(1, ceil((alpha + beta * length) / UNIT)) * UNIT for alpha, beta in plan[layer]]
