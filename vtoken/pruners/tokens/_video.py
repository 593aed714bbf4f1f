"""Shared by methods for videos. Pictures and one-frame videos keep all tokens and do not count towards a total."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from vtoken.stages import Grid, Parts, Pruner
from vtoken.stages.budget import Budget

AnyPruner = TypeVar("AnyPruner", bound=Pruner)


def whole_videos(stage: AnyPruner) -> AnyPruner:
    """Refuses budgets per frame or crop.

    Raises:
        ValueError: names the budgets that fit.
    """
    if stage.keep.per is not None:
        raise ValueError(
            f"{stage.name} spends one budget over all frames of a video, so {stage.keep.per} does not fit; give the "
            "video's (keep: 64) or a share (keep: 25%)"
        )
    return stage


def counts_of_videos(
    keep: Budget, lengths: Sequence[int], parts: Sequence[Parts], row: Sequence[int], least: Callable[[Grid], int]
) -> tuple[int, ...]:
    """Tokens to keep of each image: for a video its budget, but at least `least` of its raster; for a picture all."""
    videos = [i for i, image in enumerate(parts) if len(image) == 1 and image[0][0] > 1]
    wanted = keep.counts([lengths[i] for i in videos], [row[i] for i in videos])
    counts = list(lengths)
    for i, k in zip(videos, wanted, strict=True):
        counts[i] = min(lengths[i], max(k, least(parts[i][0])))
    return tuple(counts)
