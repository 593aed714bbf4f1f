"""Trees of similar tokens across the frames of a video, for FlashVID."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from vtoken.kernels import nearest_tokens, topk_tokens
from vtoken.pruners.tokens._video import sums
from vtoken.stages import image_of, offsets_of, uploaded
from vtoken.stages.budget import apportion


class Trees(NamedTuple):
    """Attributes:
    root: [M] row of the root of each row's tree.
    size: [M] fp32 number of rows of that tree.
    near: [M] fp32 1 + the number of rows that are linked to its root directly.
    """

    root: Tensor
    size: Tensor
    near: Tensor

    def standing(self, frame: Tensor, frames: int) -> tuple[list[int], Tensor, Tensor]:
        """How many trees have their root in each frame, where `frame` [M] is that of each row; [R] rows of the roots,
        ascending; [M] which of these is each row's root. Waits for the device, for the number of trees."""
        own = torch.arange(len(self.root), device=frame.device)
        alone = self.root == own
        each = torch.bincount(frame, alone.float(), frames).int().tolist()
        roots = (~alone).sort(stable=True).indices[: sum(each)]
        return each, roots, torch.empty_like(own).index_copy_(0, roots, own[: len(roots)])[self.root]


def grow(x: Tensor, lengths: Sequence[int], segments: Sequence[int], most: Sequence[int], similarity: float) -> Trees:
    """Links each of the rows x [M, D] to its most similar row of the frame before, in the same segment, if their cosine
    is above `similarity`; if a segment has more than `most` such links, only the most - 1 closest are made. Does not
    wait for the device.

    Args:
        lengths: rows of each frame; segments: frames of each segment; most: the most links of each segment.
    """
    own = torch.arange(len(x), device=x.device)
    parent = _parents(x, lengths, segments, most, similarity)
    size, root = torch.ones(len(x), device=x.device), parent
    near = size.index_add(0, parent, (parent != own).float())
    for _ in range(max(segments).bit_length()):
        root = root[root]
    return Trees(root, torch.zeros_like(size).index_add_(0, root, size)[root], near[root])


def _parents(
    x: Tensor, lengths: Sequence[int], segments: Sequence[int], most: Sequence[int], similarity: float
) -> Tensor:
    """[M] row that each row is linked to, itself if none."""
    device, own, start = x.device, torch.arange(len(x), device=x.device), [0, *accumulate(lengths)]
    later = sorted(set(range(len(lengths))) - {0, *accumulate(segments)})
    mine, theirs = ([row for f in later for row in range(start[f - b], start[f - b + 1])] for b in (0, 1))
    if not mine or not theirs:
        return own
    rows, others = uploaded(mine, device), uploaded(theirs, device)
    ends, other_ends = (offsets_of([lengths[f - b] for f in later], device) for b in (0, 1))
    cosine, partner = nearest_tokens(x[rows], x[others], ends, other_ends)
    value = torch.full((len(x),), -torch.inf, device=device).index_copy_(0, rows, cosine)
    rows_of = sums(lengths, segments)
    segment, linked = image_of(rows_of, device), value > similarity
    closest = [max(0, min(n, k - 1)) for n, k in zip(rows_of, most, strict=True)]
    best = topk_tokens(value, offsets_of(rows_of, device), closest)
    close = torch.zeros_like(linked).index_fill_(0, best, True)
    links = torch.zeros(len(rows_of), device=device).index_add_(0, segment, linked.float())
    linked &= close | (links <= uploaded(most, device))[segment]
    partners = own.index_copy(0, rows, others[partner.clamp(min=0)])
    return torch.where(linked, partners, own)


def clusters(standing: Sequence[int], segments: Sequence[int], rooms: Sequence[int], rounded_up: bool) -> list[int]:
    """Clusters of each frame. A segment's frames share its room in proportion to their trees, `standing`."""
    counts, start = [], 0
    for frames, room in zip(segments, rooms, strict=True):
        lengths = standing[start : start + frames]
        ratio = room / max(1, sum(lengths))
        if rounded_up:
            counts += [math.ceil(n * ratio) if ratio < 1 else n for n in lengths]
        else:
            counts += apportion(torch.tensor(lengths, dtype=torch.float64) * ratio, lengths, room)
        start += frames
    return counts
