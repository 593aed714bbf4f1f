"""Heads of a decoder, named in a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vtoken.compressors._files import existing

Heads = tuple[tuple[int, int], ...]  # (layer, query head)


def read(name: str) -> Heads:
    """The heads in a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = existing(Path(name), name, "take a path to JSON [[layer, head], ...]")
    try:
        pairs: Any = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    if not isinstance(pairs, list) or not all(isinstance(p, list) and list(map(type, p)) == [int, int] for p in pairs):
        raise ValueError(f"{path} must hold [[layer, head], ...], two whole numbers for every head")
    return tuple((layer, head) for layer, head in pairs)
