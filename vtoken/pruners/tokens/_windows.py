"""Windows of a video in which many places do not change, for HoliTom and PruneVid."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from vtoken.kernels import merge_tokens
from vtoken.stages import image_of, uploaded


class Groups(NamedTuple):
    """The n tokens of a video in groups of members: first a group per window, of its still places (averaged over the
    window), then a group per frame, of its other tokens.

    Attributes:
        order: [R] one row per member, group by group; that of a still place is in the first frame of its window.
        slot: [n] which member each token belongs to.
        sizes: number of members of each group.
        values: [R, D] fp32 mean of the tokens of each member.
        tokens: [R] number of tokens of each member.
    """

    order: Tensor
    slot: Tensor
    sizes: list[int]
    values: Tensor
    tokens: Tensor


def grouped(
    x: Tensor, row: Tensor, place: Tensor, lengths: Sequence[int], windows: Sequence[tuple[int, int]], still: Tensor
) -> Groups:
    """The groups of a video. Waits for the device, for their sizes.

    Args:
        x: [n, D] tokens; row, place, lengths: as `by_place` gives them.
        still: [windows, P] whether a place stands still in that window.
    """
    device, own = place.device, torch.arange(len(place), device=place.device)
    frame = image_of(lengths, device)
    window = image_of([b - a + 1 for a, b in windows], device)[frame]
    first = uploaded([a for a, _ in windows], device)
    stays = still[window, place]
    root = torch.where(stays, row[first[window], place], own)
    group = torch.where(stays, window, len(windows) + frame)
    sizes = own.new_zeros(len(windows) + len(lengths)).index_add_(0, group, (root == own).to(own)).tolist()
    order = torch.where(root == own, group, len(sizes)).argsort(stable=True)[: sum(sizes)]
    slot = torch.empty_like(own).index_copy_(0, order, own[: len(order)])[root]
    members = own.new_zeros(len(order)).index_add_(0, slot, torch.ones_like(slot))
    return Groups(order, slot, sizes, merge_tokens(x.float(), slot, len(order)), members)


def static_windows(alike: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Cuts a video into windows so that as many tokens as possible repeat the first frame of their window.

    Args:
        alike: [F - 1, P] whether a place resembles itself in the next frame.

    Returns:
        First and last frame of each window; tokens that repeat. A place that is alike in all of a window of w frames
        repeats w - 1 times. Of equal cuts the one with fewer frames in its last window. Waits for the device.
    """
    frames = len(alike) + 1
    still: list[list[int]] = torch.stack([_still(alike, start, frames) for start in range(frames)]).tolist()
    best, begins = [0] * (frames + 1), [0] * frames
    for end in range(frames):
        best[end + 1], begins[end] = best[end], end
        for begin in range(end - 1, -1, -1):
            saved = best[begin] + still[begin][end] * (end - begin)
            if saved > best[end + 1]:
                best[end + 1], begins[end] = saved, begin
    windows, end = [], frames - 1
    while end >= 0:
        windows.append((begins[end], end))
        end = begins[end] - 1
    return windows[::-1], best[frames]


def _still(alike: Tensor, start: int, frames: int) -> Tensor:
    """[frames] number of places that are alike from frame `start` up to each later one; 0 for frames up to `start`."""
    counts = torch.zeros(frames, dtype=torch.int64, device=alike.device)
    counts[start + 1 :] = alike[start:].to(torch.int64).cumprod(0).sum(1)
    return counts


def scenes(labels: Sequence[int]) -> list[tuple[int, int]]:
    """First and last frame of each window, from the cluster of each frame. A cluster's longest runs of frames stay, if
    they are longer than one frame; frames between runs join the longer neighbouring run, the left one on a tie."""
    runs, at = [], 0
    for label, of in groupby(labels):
        size = len(list(of))
        runs.append((label, at, size))
        at += size
    longest = {label: max(size for other, _, size in runs if other == label) for label in labels}
    new: list[int | None] = [None] * len(labels)
    for label, at, size in runs:
        if size == longest[label] > 1:
            new[at : at + size] = [label] * size
    for f in range(len(new)):
        if new[f] is None:
            end = next((g for g in range(f, len(new)) if new[g] is not None), len(new))
            before, after = _run(new[:f][::-1]), _run(new[end:])
            source = f - 1 if f and before >= after else end
            new[f:end] = [new[source] if source < len(new) else 0] * (end - f)
    ends = [f for f in range(len(new)) if f + 1 == len(new) or new[f] != new[f + 1]]
    return list(zip([0, *(f + 1 for f in ends[:-1])], ends, strict=True))


def _run(labels: Sequence[int | None]) -> int:
    """How many of the first labels are equal."""
    return next((i for i, label in enumerate(labels) if label != labels[0]), len(labels))
