"""Which images stand in prompts of few visual tokens, told before the vision tower runs: stages in it leave those alone.

Where every prompt is one, no facts are worked out either. Rows are known as soon as the prompt is: to `generate`, which since transformers
5.18 encodes before the first forward, or to the forward itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.flow import eager
from vtoken.hooks.images import assign
from vtoken.hooks.layout import few
from vtoken.run import KINDS, Layout, Run, Sparing

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Guard:
    """Leaves a `Sparing` per kind in `run.sparing` for the feature functions. `Outer` tells it of calls.

    Args:
        least: visual tokens below which a row runs dense.
    """

    def __init__(self, adapter: Any, run: Run, least: int) -> None:
        self.adapter, self.run, self.least = adapter, run, least

    def ahead(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> None:
        """Before `generate`, given its arguments."""
        self.look(self.adapter.visual_kinds(ids, embeds)[:, -_last(ids, embeds, kwargs) :], kwargs)

    @eager
    def look(self, kinds: Tensor, kwargs: dict) -> None:
        """Before a prompt with pixels is encoded.

        Args:
            kinds: [B, L] as `Adapter.visual_kinds` gives them; kwargs: of the call.
        """
        mask = _padding(kwargs)
        if mask is not None and mask.shape[1] >= kinds.shape[1]:
            kinds = kinds.masked_fill(~mask[:, -kinds.shape[1] :].to(kinds.device).bool(), 0)
        try:
            layouts = {kind: self.adapter.layouts(kind, kwargs) for kind in pictured(kwargs)}
            each = torch.stack([(kinds == 1 + KINDS.index(kind)).sum(1) for kind in layouts]).tolist()
            self.run.sparing = spared(layouts, dict(zip(layouts, each, strict=True)), self.adapter, self.least)
        except (KeyError, TypeError, ValueError):
            self.run.sparing = {}  # What is missing or does not fit is said where the call stops.


def pictured(kwargs: dict) -> list[str]:
    """Of which kinds a call brings pixels."""
    return [kind for kind, name in PIXELS.items() if kwargs.get(name) is not None]


def _padding(kwargs: dict) -> Tensor | None:
    """The padding mask [B, L]. None for the 4D masks that `generate` builds for a static cache, of some decoders one per layer type."""
    mask = kwargs.get("attention_mask")
    return mask if torch.is_tensor(mask) and mask.ndim == 2 else None


def _last(ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> int:
    """How many columns are of the turn to come: `generate` is told the whole conversation, or by its mask how long that is. 0 means all."""
    cache, mask = kwargs.get("past_key_values"), _padding(kwargs)
    past = 0 if cache is None else int(cache.get_seq_length())
    whole = mask if mask is not None else ids if ids is not None else embeds
    assert whole is not None
    return whole.shape[1] - past if past else 0


def spared(
    layouts: dict[str, tuple[Layout, ...]], counts: dict[str, list[int]], adapter: Any, least: int
) -> dict[str, Sparing]:
    """Per kind, which of its images stand in rows with fewer than `least` visual tokens of all kinds.

    Args:
        counts: per kind, its positions in each row, newline tokens among them.

    Raises:
        ValueError: the rows cannot be filled with whole images.
    """
    rows = {kind: assign(counts[kind], each, adapter) for kind, each in layouts.items()}
    held = [0] * len(next(iter(counts.values())))
    for images in rows.values():
        for image in images:
            held[image.row] += image.layout.tokens
    dense = {row for row, n in enumerate(held) if n < least}
    every = {image.row for images in rows.values() for image in images}
    aside = few(max(held), least) if every <= dense else None
    out = {}
    for kind, images in rows.items():
        flags = [False] * len(layouts[kind])
        for image in images:
            flags[image.index] = image.row in dense
        out[kind] = Sparing(tuple(flags), aside)
    return out


def alone(layouts: tuple[Layout, ...], least: int) -> Sparing:
    """Where features are asked for without a prompt, each image counts for itself."""
    return Sparing(tuple(layout.tokens < least for layout in layouts))
