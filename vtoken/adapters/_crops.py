"""What families share whose crops are equal squares of tokens, each a raster of its picture."""

from __future__ import annotations

import torch

from vtoken.hooks.state.run import ImageLayout


def picture(crops: int, side: int) -> ImageLayout:
    """The layout of a picture of so many crops of side x side tokens."""
    segment = torch.arange(crops).repeat_interleave(side**2) if crops > 1 else None
    return ImageLayout(((1, side, side),) * crops, segment)


def single_crops(tokens: int, side: int) -> tuple[ImageLayout, ...]:
    """The layouts of so many placeholders, each crop taken for a picture.

    Raises:
        ValueError: they are not whole crops.
    """
    crops, rest = divmod(tokens, side**2)
    if rest:
        raise ValueError(
            f"{tokens} image placeholders are not a whole number of crops of {side**2} tokens; is the prompt prefilled "
            "in chunks? Set prefill_chunk_size=None"
        )
    return (picture(1, side),) * crops
