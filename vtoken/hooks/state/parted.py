"""Which crops of a prompt are one picture, where text stands between them and nothing else tells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.stages import Parts, size_of
from vtoken.stages.tokens import Grid


def crops_of(given: Tensor, kinds: Tensor, crops: int, tokens: int) -> list[int]:
    """How many crops each picture has, in reading order. Asks the device.

    A mark stands in front of every crop and one after each picture: one between two crops of a picture, two between
    two pictures. The mark is the token that follows the last picture of a row. Where the prompt does not hold so many
    crops, or has other tokens inside of one, each crop is a picture.

    Args:
        given: [B, L] ids, or [B, L, D] embeddings.
        kinds: [B, L], not 0 at placeholders.
        crops: how many were given as pixels; tokens: placeholders of each.
    """
    row, column = (kinds > 0).nonzero(as_tuple=True)
    if len(column) != crops * tokens:
        return [1] * crops
    row, first, last = row[::tokens], column[::tokens], column[tokens - 1 :: tokens]
    length = given.shape[1]
    behind = row.new_zeros(len(given)).scatter_reduce_(0, row, last + 1, "amax")
    # In a row that ends on a picture no mark follows, and none is found.
    closing = given[torch.arange(len(given), device=given.device), behind.clamp(max=length - 1)][:, None]
    mark = (given == closing if given.ndim == 2 else (given == closing).all(-1)) & (kinds == 0)
    seen = mark.cumsum(1)
    between = seen[row[1:], first[1:]] - seen[row[:-1], last[:-1]]
    follows = (row[1:] == row[:-1]) & (between == 1)
    whole = (last - first == tokens - 1).all()
    out = [1]
    for same in (follows & whole).tolist():
        out[-1:] = [out[-1] + 1] if same else [out[-1], 1]
    return out


def side_by_side(crops: Sequence[Grid], kinds: Tensor | None) -> list[Parts]:
    """The crops of each picture, in reading order, where at most one token stands between two crops of a picture, and
    more between two pictures. Asks the device.

    A picture that is cut has at least two equal crops, and behind them, with most processors, the whole picture scaled
    down. Where the prompt does not hold these crops, or they are not like this, each is a picture.

    Args:
        crops: their rasters; kinds: [B, L], not 0 at placeholders; None: no prompt is known.
    """
    each = [size_of((crop,)) for crop in crops]
    shown = torch.empty(0, 0) if kinds is None else torch.tensor((kinds > 0).tolist())
    row, column = shown.nonzero(as_tuple=True)
    if len(column) != sum(each):
        return [(crop,) for crop in crops]
    ends = torch.tensor(each).cumsum(0) - 1
    starts = ends + 1 - torch.tensor(each)
    row, first, last = row[starts], column[starts], column[ends]
    whole = (last - first == ends - starts).all()
    near = (row[1:] == row[:-1]) & (first[1:] - last[:-1] <= 2) & whole
    groups: list[list[Grid]] = [[crops[0]]]
    for crop, follows in zip(crops[1:], near.tolist(), strict=True):
        groups[-1:] = [[*groups[-1], crop]] if follows else [groups[-1], [crop]]
    return [
        part for group in groups for part in ([tuple(group)] if cut_equally(group) else [(crop,) for crop in group])
    ]


def cut_equally(crops: Sequence[Grid]) -> bool:
    """Whether these can be the crops of one picture: all alike, or all but the last of at least three."""
    return len(set(crops)) == 1 or (len(crops) > 2 and len(set(crops[:-1])) == 1)


def real(pixels: Tensor, mask: Tensor | None, patch: int) -> int:
    """How many crops of pixels [rows, crops, 3, H, W] are no padding, that is, not all zero; at least 1. Asks the
    device.

    Args:
        mask: [rows, crops, H, W], 0 at padding; patch: edge of a patch in pixels.

    Raises:
        UnsupportedError: the mask hides a patch of a crop that is no padding.
    """
    shown = (pixels != 0).flatten(2).any(-1)
    found = [shown.sum()]
    if mask is not None:
        patches = mask.unfold(2, patch, patch).unfold(3, patch, patch).flatten(4).any(-1)
        found.append((shown & ~patches.flatten(2).all(-1)).sum())
    number, *partial = torch.stack(found).tolist()
    if any(partial):
        raise UnsupportedError(
            "pixel_attention_mask hides a part of a picture, of which the model makes tokens all the same; resize "
            "pictures to whole crops, as the model's processor does, or call vtoken.unwrap(model) first"
        )
    return max(int(number), 1)
