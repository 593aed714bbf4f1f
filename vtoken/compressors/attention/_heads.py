"""Heads of a decoder, named in a file."""

from __future__ import annotations

from vtoken.compressors._files import from_json

Heads = tuple[tuple[int, int], ...]  # (layer, query head)


def read(name: str) -> Heads:
    """The heads in a file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path, pairs = from_json(name, "take a path to JSON [[layer, head], ...]")
    if not isinstance(pairs, list) or not all(isinstance(p, list) and list(map(type, p)) == [int, int] for p in pairs):
        raise ValueError(f"{path} must hold [[layer, head], ...], two whole numbers for every head")
    return tuple((layer, head) for layer, head in pairs)
