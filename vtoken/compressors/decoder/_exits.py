"""Shared by exits: the images of a batch row stay or leave together, depending on the text after the last of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.stages import Keep, VisualTokens, image_of, keep_all, positions, uploaded


def last_of(row: Sequence[int]) -> list[int]:
    """For each image, the last image of its row."""
    last = {r: i for i, r in enumerate(row)}
    return [last[r] for r in row]


def behind_all(tokens: VisualTokens) -> list[Tensor]:
    """For each image, the text after the last image of its row, as indices into its later_text."""
    texts = tokens.fact("later_text")
    return [
        torch.arange(len(text) - len(texts[k]), len(text)) for text, k in zip(texts, last_of(tokens.row), strict=True)
    ]


def mass(tokens: VisualTokens, attention: Tensor) -> Tensor:
    """[images] attention [ΣN] summed over all images of each image's row."""
    row = uploaded(tokens.row, attention.device)
    token = row[image_of(tokens.lengths, attention.device)]
    return attention.new_zeros(max(tokens.row, default=0) + 1).index_add_(0, token, attention)[row]


def asked(tokens: VisualTokens, least: int = 1) -> list[bool]:
    """For each image, whether its row still has images, and at least `least` text tokens after the last of them."""
    texts, alive = tokens.fact("later_text"), {r for r, n in zip(tokens.row, tokens.lengths, strict=True) if n}
    return [r in alive and len(texts[k]) >= least for r, k in zip(tokens.row, last_of(tokens.row), strict=True)]


def leave(tokens: VisualTokens, gone: Sequence[bool]) -> Keep:
    """The decision that these images lose all tokens and the others stay unchanged."""
    if not any(gone):
        return keep_all(tokens)
    stay = uploaded([not g for g in gone], tokens.x.device, torch.bool)[image_of(tokens.lengths, tokens.x.device)]
    lengths = tuple(0 if g else n for g, n in zip(gone, tokens.lengths, strict=True))
    return Keep(positions(stay, sum(lengths)), lengths)
