"""MoA's plans: the window of every decoder layer and head as a function of the prompt's length."""

from __future__ import annotations

import reprlib
from math import ceil, isfinite
from pathlib import Path
from typing import Any

from vtoken.compressors._files import from_json

Plan = tuple[tuple[tuple[float, float], ...], ...]  # layer, head: alpha and beta of a window of alpha + beta * N
FORMS = '{"0": {"0": [alpha, beta], ...}, ...} or {"alphas": [[...], ...], "betas": [[...], ...]}'
UNIT = 64  # a window is whole blocks of so many tokens


def read(name: str) -> Plan:
    """The plan in a JSON file, by layer and head or as the authors write it.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path, plan = from_json(name, f"take a path to JSON {FORMS}", parse_int=float)
    if not isinstance(plan, dict) or not plan:
        raise ValueError(f"{path} must hold {FORMS}")
    if set(plan) != {"alphas", "betas"}:
        return _checked(_table(plan, str(path)), path)
    alphas, betas = (_table(plan[name], f"{path}, {name}") for name in ("alphas", "betas"))
    if [len(row) for row in alphas] != [len(row) for row in betas]:
        raise ValueError(f"{path} must hold as many betas as alphas in every layer")
    return _checked([[*zip(*pair, strict=True)] for pair in zip(alphas, betas, strict=True)], path)


def _table(given: Any, what: str) -> list[list[Any]]:
    """The entries per layer and head."""
    return [_entries(row, f"{what}, layer {k}") for k, row in enumerate(_entries(given, what))]


def _entries(given: Any, what: str) -> list[Any]:
    """The values of a list, or of an object whose keys number them from 0 on."""
    if isinstance(given, list):
        return given
    if not isinstance(given, dict) or set(given) != {str(k) for k in range(len(given))}:
        raise ValueError(f"{what} must hold one entry after the other, from 0 on: {FORMS}")
    return [given[str(k)] for k in range(len(given))]


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
