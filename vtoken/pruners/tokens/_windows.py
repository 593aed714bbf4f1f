"""Windows of a video in which many places do not change, for HoliTom."""

from __future__ import annotations

import torch
from torch import Tensor


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
    """[frames] places that are alike from frame `start` up to each later one; 0 up to `start`."""
    counts = torch.zeros(frames, dtype=torch.int64, device=alike.device)
    counts[start + 1 :] = alike[start:].to(torch.int64).cumprod(0).sum(1)
    return counts
