"""Layouts of pictures whose crops are rasters of their own, most of them equal squares of tokens."""

from __future__ import annotations

import torch

from vtoken.hooks.state.run import ImageLayout
from vtoken.stages import Parts


def of_rasters(crops: Parts) -> ImageLayout:
    """The layout of a picture with these crops (1, rows, columns)."""
    if len(crops) == 1:
        return ImageLayout(crops)
    each = torch.tensor([rows * columns for _, rows, columns in crops])
    return ImageLayout(crops, torch.arange(len(crops)).repeat_interleave(each))


def picture(crops: int, side: int) -> ImageLayout:
    """The layout of a picture with `crops` crops of side x side tokens each."""
    return of_rasters(((1, side, side),) * crops)


def single_crops(tokens: int, side: int) -> tuple[ImageLayout, ...]:
    """The layouts of the crops that fill `tokens` placeholders, each crop as a picture of its own.

    Raises:
        ValueError: `tokens` is not a whole number of crops.
    """
    crops, rest = divmod(tokens, side**2)
    if rest:
        raise ValueError(
            f"{tokens} image placeholders are not a whole number of crops of {side**2} tokens; is the prompt prefilled "
            "in chunks? Set prefill_chunk_size=None"
        )
    return (picture(1, side),) * crops
