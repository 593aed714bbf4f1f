"""Finds the images of prompts with fewer visual tokens than `min_visual_tokens` before the vision tower runs, so that
its stages leave them alone.

If every prompt of a call has too few, no facts are computed either. Rows are counted where the prompt is first seen: in
`generate`, which since transformers 5.18 encodes before the first forward, or in the forward itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.errors import NotWholeError
from vtoken.hooks.state.cache_argument import cache_of
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.image_spans import Image, assign
from vtoken.hooks.state.left_padding import too_few
from vtoken.hooks.state.run import KINDS, PIXELS, ImageLayout, SkipPlan, newline_mask, pixels_of


class MinTokensGuard:
    """Leaves a `SkipPlan` per kind in `run.skip_plans` for the feature functions. `CallInputs` calls it before the
    tower runs."""

    def __init__(self, context: Context) -> None:
        self.adapter, self.run, self.min_tokens = context.adapter, context.run, context.min_tokens

    def ahead(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> None:
        """Before `generate`, given its arguments."""
        self.look(self.adapter.visual_kinds(ids, embeds, pictured(kwargs))[:, -newest(ids, embeds, kwargs) :], kwargs)

    @eager
    def look(self, kinds: Tensor, kwargs: dict) -> None:
        """Before a prompt with pixels is encoded.

        Args:
            kinds: [B, L] as `Adapter.visual_kinds` gives them; kwargs: of the call.
        """
        mask = _padding(kwargs)
        hidden = torch.zeros_like(kinds, dtype=torch.bool)
        if mask is not None and mask.shape[1] >= kinds.shape[1]:
            hidden = (kinds > 0) & ~mask[:, -kinds.shape[1] :].to(kinds.device).bool()
        layouts = {kind: self.adapter.layouts(kind, {**kwargs, **self.run.prompt}) for kind in pictured(kwargs)}
        of_kind = [kinds == 1 + KINDS.index(kind) for kind in layouts]
        *each, unseen = torch.stack([here.sum(1) for here in (*of_kind, hidden)]).tolist()
        try:
            images = {kind: assign(n, layouts[kind], self.adapter) for kind, n in zip(layouts, each, strict=True)}
        except NotWholeError:
            self.run.skip_plans = {}  # Each picture counts for itself; what does not fit is said where the call stops.
            return
        visual = [0] * len(kinds)
        for here, found in zip(of_kind, images.values(), strict=True):
            for image in found:
                visual[image.row] += image.layout.tokens
            if any(unseen):
                visual = [n - m for n, m in zip(visual, lost(here, hidden, found), strict=True)]
        self.run.skip_plans = skipped(layouts, images, visual, self.min_tokens)


def pictured(kwargs: dict) -> list[str]:
    """The kinds (image, video) for which a call has pixels."""
    return [kind for kind in PIXELS if pixels_of(kind, kwargs) is not None]


def _padding(kwargs: dict) -> Tensor | None:
    """The padding mask [B, L]. None for the 4D masks that `generate` builds for a static cache (a dict of them,
    one per layer type, for some decoders)."""
    mask = kwargs.get("attention_mask")
    return mask if torch.is_tensor(mask) and mask.ndim == 2 else None


def newest(ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> int:
    """How many of the last columns are not cached yet: `generate` is given the whole conversation, or a mask as long
    as that. 0 means all."""
    cache, mask = cache_of(kwargs), _padding(kwargs)
    past = 0 if cache is None else int(cache.get_seq_length())
    whole = mask if mask is not None else ids if ids is not None else embeds
    assert whole is not None
    return whole.shape[1] - past if past else 0


def lost(here: Tensor, hidden: Tensor, images: list[Image]) -> list[int]:
    """Visual tokens per row that the padding mask hides, newlines not counted. Asks the device.

    Args:
        here: [B, L] bool, placeholders of `images`; hidden: [B, L] bool, placeholders that the mask hides.
    """
    batch_row, column = here.nonzero(as_tuple=True)
    newline = newline_mask([image.layout for image in images]).to(here.device)
    gone: list[int] = (
        batch_row.new_zeros(len(here)).index_add_(0, batch_row, (hidden[batch_row, column] & ~newline).long()).tolist()
    )
    return gone


def skipped(
    layouts: dict[str, tuple[ImageLayout, ...]], rows: dict[str, list[Image]], visual: list[int], min_tokens: int
) -> dict[str, SkipPlan]:
    """Per kind, which of its images stand in rows with fewer than `min_tokens` visual tokens of all kinds.

    Args:
        layouts, rows: per kind, of the images of the call; visual: visual tokens per row that the padding mask shows.
    """
    dense = {row for row, n in enumerate(visual) if n < min_tokens}
    every = {image.row for images in rows.values() for image in images}
    skip_reason = too_few(max(visual), min_tokens) if every <= dense else None
    out = {}
    for kind, images in rows.items():
        flags = [False] * len(layouts[kind])
        for image in images:
            flags[image.index] = image.row in dense
        out[kind] = SkipPlan(tuple(flags), skip_reason)
    return out


def alone(layouts: tuple[ImageLayout, ...], min_tokens: int) -> SkipPlan:
    """Where features are asked for without a prompt, each image counts for itself."""
    return SkipPlan(tuple(layout.tokens < min_tokens for layout in layouts), counted="images")
