"""Choosing frames by given scores: pure functions on the scores of one video, [F] float64 on the CPU. Every rule
returns exactly k < F frames, ascending; ties go to the earlier frame."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Scores = tuple[float, ...]


def top(scores: Tensor, k: int) -> list[int]:
    """The k frames with the highest scores."""
    return sorted(best(scores, range(len(scores)), k))


def aks(scores: Tensor, k: int, threshold: float = 0.8, depth: int = 5) -> list[int]:
    """Adaptive keyframe sampling. The video is halved, and its parts again, up to `depth` times, unless the mean of a
    part's k best scores (scaled to 0..1) is more than `threshold` above the mean of all its scores. After l halvings, a
    part gives its k >> l best frames."""
    low, high = scores.aminmax()
    scaled = (scores - low) / (high - low) if high > low else torch.zeros_like(scores)
    chosen: list[int] = []
    stretches = [(0, len(scores), 0)]
    while stretches:
        start, stop, level = stretches.pop()
        here = scaled[start:stop]
        stands_out = here.topk(min(k, len(here))).values.mean() - here.mean() > threshold
        if stands_out or level == depth or len(here) < 2:
            chosen += best(scaled, range(start, stop), k >> level)
        else:
            middle = start + len(here) // 2
            stretches += [(start, middle, level + 1), (middle, stop, level + 1)]
    return filled(scores, chosen, k)


def anchors(scores: Tensor, k: int) -> list[int]:
    """The best frame between every two consecutive valleys (local minima, and both ends of the video). If these are
    more than k, k-means on their times makes k groups, and the best frame of each group stays."""
    s, n = scores.tolist(), len(scores)
    valleys = [i for i in range(n) if i in (0, n - 1) or (s[i] <= s[i - 1] and s[i] <= s[i + 1])]
    peaks = sorted({best(scores, range(a, b + 1), 1)[0] for a, b in pairwise(valleys)})
    if len(peaks) > k:
        peaks = [best(scores, group, 1)[0] for group in grouped(peaks, k) if group]
    return filled(scores, peaks, k)


def drawn(scores: Tensor, k: int, seed: int = 0) -> list[int]:
    """Drawn without replacement, in proportion to the scores; then the earliest others, if fewer than k are above 0."""
    generator = torch.Generator().manual_seed(seed)
    able = int((scores > 0).sum())
    picked = torch.multinomial(scores, min(k, able), generator=generator).tolist() if able else []
    return filled(scores, picked, k)


def grouped(times: Sequence[int], k: int) -> list[list[int]]:
    """k groups of `times`, by Lloyd's k-means from means that are evenly spaced in the list of times."""
    t = torch.tensor(times, dtype=torch.float64)
    means = t[(2 * torch.arange(k) + 1) * len(t) // (2 * k)]
    owner = torch.full((len(t),), -1)
    while True:
        now = (t[:, None] - means).abs().argmin(1)
        if torch.equal(now, owner):
            return [[time for time, of in zip(times, owner.tolist(), strict=True) if of == j] for j in range(k)]
        owner = now
        means = torch.stack([t[owner == j].mean() if (owner == j).any() else means[j] for j in range(k)])


def best(scores: Tensor, among: Sequence[int], k: int) -> list[int]:
    """The k frames of `among` with the highest scores, best first."""
    s = scores.tolist()
    return sorted(among, key=lambda i: (-s[i], i))[:k]


def filled(scores: Tensor, chosen: Sequence[int], k: int) -> list[int]:
    """`chosen`, filled up to k with the best of the other frames; ascending."""
    rest = sorted(set(range(len(scores))) - set(chosen))
    return sorted([*chosen, *best(scores, rest, k - len(chosen))])


def read(name: str) -> tuple[Scores, ...]:
    """The scores in a JSON file.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    path = Path(name)
    try:
        given = json.loads(path.read_text(encoding="utf-8"), parse_int=float)
    except FileNotFoundError:
        raise ValueError(f"no file {name[:200]!r}; write a JSON list with one number per frame") from None
    except (ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{name[:200]!r} is no JSON that can be read: {error}") from None
    return checked(given, name)


def checked(given: Any, what: str) -> tuple[Scores, ...]:
    """One tuple of scores per video; a single tuple counts for all videos.

    Raises:
        ValueError: names `what` if it is not made of finite numbers.
    """
    rows = given if isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple)) else [given]
    for row in rows:
        if not isinstance(row, (list, tuple)) or not row:
            raise ValueError(f"{what} must hold [0.1, 0.9, ...], one number per frame, or one such list per video")
        for x in row:
            if type(x) not in (int, float) or not isfinite(x):
                raise ValueError(f"{what} must hold finite numbers, not {reprlib.repr(x)}")
    return tuple(tuple(map(float, row)) for row in rows)
