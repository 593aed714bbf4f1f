"""Positions of a prompt whose pictures were resized: those of the prompt with the smaller pictures.

Rows and columns are numbered from where a picture stands, so the tokens of its corner are numbered as those of the
smaller picture. Text after it follows where the longer side ends.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.hooks.boundary.prompt_images import PromptImages
from vtoken.hooks.state.forward_state import ForwardState
from vtoken.hooks.state.live_tokens import LiveTokens
from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.stages import Grid, uploaded


def moved_up(flow: ForwardState, found: PromptImages) -> tuple[Tensor, Tensor | None]:
    """Position ids [axes, B, L] of all columns, and [B] how much further than before decode steps lag behind what the
    model counts (None where no picture was resized).

    Args:
        flow: before anything is decided; its positions [axes, B or 1, L] are those of the model.
        found: the pictures of the prompt.
    """
    positions, cache, spans = flow.positions, flow.cache, found.spans
    if isinstance(cache, PrunedCache) and cache.shifted and not flow.renumbers:
        shift = cache.groups[0].shift
        assert shift is not None
        positions = positions - shift[:, None].to(positions.device)
    if not any(smaller := spans.smaller):
        return positions, None
    given: list[Grid] = [layout.parts[0] for layout in spans.layouts]
    wanted = [new or old for new, old in zip(smaller, given, strict=True)]
    new = positions - lag_behind_runs(found.whole, given, wanted, flow.new).to(positions.device)
    shown = flow.new.to(positions.device)
    left = without_dropped(found.whole, given, wanted, shown)
    # The first of four axes numbers tokens for the mask.
    before, now = (
        p[-3:].expand(-1, *m.shape).masked_fill(~m, 0).amax((0, 2)) for p, m in ((positions, shown), (new, left))
    )
    return new, (before - now).to(flow.new.device)


def lag_behind_runs(whole: LiveTokens, given: list[Grid], wanted: list[Grid], new: Tensor) -> Tensor:
    """[B, L] how far every column lags: the sum of what the longer sides of the pictures before it lost. Where text
    stands between the frames of a video, each frame before it counts."""
    device = whole.column.device
    lost = uploaded([max(a[1:]) - max(b[1:]) for a, b in zip(given, wanted, strict=True)], device)
    follows = (whole.column[1:] == whole.column[:-1] + 1) & (whole.image[1:] == whole.image[:-1])
    ends = torch.cat([~follows, follows.new_ones(1)])
    own = torch.zeros(new.shape, dtype=torch.long, device=device)
    own[whole.batch_row, whole.column] = torch.where(ends, lost[whole.image], 0)
    own = own.masked_fill(~new.to(device), 0)
    return own.cumsum(1) - own


def without_dropped(whole: LiveTokens, given: list[Grid], wanted: list[Grid], shown: Tensor) -> Tensor:
    """[B, L] which of the columns that are `shown` have a place in the prompt with the smaller pictures."""
    image, at = whole.image, whole.history.raster_index
    height, width, rows, columns = (
        uploaded(each, at.device)[image]
        for each in ([g[1] for g in given], [g[2] for g in given], [g[1] for g in wanted], [g[2] for g in wanted])
    )
    gone = (at // width % height >= rows) | (at % width >= columns)
    left = shown.clone()
    batch_row, column = (i.to(shown.device) for i in (whole.batch_row, whole.column))
    left[batch_row, column] &= ~gone.to(shown.device)
    return left
