"""Which pipelines no other one beats: nobody is better at the same cost, or cheaper at the same quality."""

from __future__ import annotations

from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of the points (cost, quality) that no other dominates, by cost. Of points that are equal all stay.

    A point dominates another if it costs no more and is no worse, and one of both is strictly better.
    """
    order = sorted(range(len(points)), key=lambda k: (points[k][0], -points[k][1]))
    found: list[int] = []
    for k in order:
        if not found or points[k][1] > points[found[-1]][1] or points[k] == points[found[-1]]:
            found.append(k)
    return found
