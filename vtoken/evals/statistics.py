"""Is a pruned model worse, or was it luck? Paired statistics of scores per question against the dense model's; spreads
and shares.

Paired functions take scores of the same questions in the same order. Questions about one picture are not independent,
so with `clusters` (the pictures) bootstrap samples are drawn of pictures.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from vtoken.errors import VtokenError


class Interval(NamedTuple):
    """An estimate and its confidence interval, all in the unit of the scores."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float


class Paired(NamedTuple):
    """Pruned against dense.

    Attributes:
        of_dense: share of the dense score that is left; None where dense scored 0.
        difference: mean of pruned minus dense.
        lost, won: questions that only dense, or only pruned, answered right; None unless every score is 0 or 1.
        p: exact two-sided McNemar test of lost against won; None likewise. It takes questions for independent.
    """

    of_dense: Interval | None
    difference: Interval
    lost: int | None
    won: int | None
    p: float | None


def paired(
    pruned: Sequence[float],
    dense: Sequence[float],
    clusters: Sequence[object] | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Paired:
    """Percentile bootstrap of the paired difference and ratio, and McNemar's test.

    Args:
        pruned, dense: scores of the same questions, finite.
        clusters: what each question belongs to (its picture); None: every question is drawn on its own.
        level: confidence of the intervals.
        resamples: bootstrap samples.
        seed: of the draws.

    Raises:
        VtokenError: no questions, different numbers of them, or scores that are not finite.
    """
    mine, theirs = (np.asarray(scores, dtype=np.float64) for scores in (pruned, dense))
    if not len(mine) or mine.shape != theirs.shape or (clusters is not None and len(clusters) != len(mine)):
        counts = f"{len(mine)} pruned, {len(theirs)} dense"
        raise VtokenError(f"paired statistics need one score per question from each model, got {counts}")
    if not (np.isfinite(mine).all() and np.isfinite(theirs).all()):
        raise VtokenError("paired statistics need finite scores; a question without one has to be left out by name")
    sums = _cluster_sums(mine, theirs, clusters)
    rng = np.random.default_rng(seed)
    drawn = np.empty((resamples, 3))
    for k in range(resamples):
        drawn[k] = sums[rng.integers(len(sums), size=len(sums))].sum(0)
    mine_drawn, theirs_drawn, count = drawn.T
    difference = _interval(float((mine - theirs).mean()), (mine_drawn - theirs_drawn) / count, level)
    of_dense = None
    if theirs.sum() > 0 and (theirs_drawn > 0).all():
        of_dense = _interval(float(mine.sum() / theirs.sum()), mine_drawn / theirs_drawn, level)
    if not (np.isin(mine, (0, 1)).all() and np.isin(theirs, (0, 1)).all()):
        return Paired(of_dense, difference, None, None, None)
    lost, won = int((theirs > mine).sum()), int((mine > theirs).sum())
    return Paired(of_dense, difference, lost, won, mcnemar(lost, won))


def mcnemar(lost: int, won: int) -> float:
    """Two-sided p of McNemar's exact test: of lost + won questions on which two models differ, is either side too large
    for a fair coin?"""
    lost, won = int(lost), int(won)  # numpy integers would overflow
    total = lost + won
    tail = sum(math.comb(total, k) for k in range(min(lost, won) + 1)) / 2**total
    return min(1.0, 2 * tail)


def agreement(answers: Sequence[str], dense: Sequence[str]) -> float:
    """Share of questions answered as the dense model does, word for word apart from case and outer space: a fidelity
    that needs no labels.

    Raises:
        VtokenError: no answers, or different numbers of them.
    """
    if not answers or len(answers) != len(dense):
        raise VtokenError(f"agreement needs as many answers as dense ones, got {len(answers)} and {len(dense)}")
    return sum(a.strip().lower() == b.strip().lower() for a, b in zip(answers, dense, strict=True)) / len(answers)


def questions_needed(effect: float, discordant: float, power: float = 0.8, alpha: float = 0.05) -> int:
    """Questions with which McNemar's test sees a difference of `effect` with the given power, when the models differ on
    a share `discordant` of all questions (Connor 1987).

    Args:
        effect: share in 0..1, 0.01 is one point.
        discordant: share in 0..1; at least `effect`.

    Raises:
        VtokenError: an effect of 0, or one larger than the share of questions that differ.
    """
    if not 0 < effect <= discordant <= 1:
        raise VtokenError(f"an effect of {effect:g} cannot be seen where {discordant:g} of the questions differ")
    side, strong = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    spread = side * math.sqrt(discordant) + strong * math.sqrt(discordant - effect**2)
    return math.ceil((spread / effect) ** 2)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linear between values."""
    return Spread(*np.quantile(np.asarray(values, dtype=np.float64), (0.5, 0.25, 0.75)).tolist())


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson interval of a share (95 % by default): (low, high), each in 0..1; (0, 1) without observations."""
    if not total:
        return 0.0, 1.0
    share, width = right / total, z * z / total
    centre = share + width / 2
    half = z * math.sqrt(share * (1 - share) / total + width / (4 * total))
    # At 0 and at 1 the interval ends there; rounding must not put the share outside.
    low, high = (centre - half) / (1 + width), (centre + half) / (1 + width)
    return max(0.0, min(low, share)), min(1.0, max(high, share))


def _cluster_sums(mine: np.ndarray, theirs: np.ndarray, clusters: Sequence[object] | None) -> np.ndarray:
    """[clusters, 3]: sums of both scores and the number of questions."""
    rows = np.stack([mine, theirs, np.ones_like(mine)], 1)
    if clusters is None:
        return rows
    order: dict[object, int] = {}
    index = [order.setdefault(cluster, len(order)) for cluster in clusters]
    sums = np.zeros((len(order), 3))
    np.add.at(sums, index, rows)
    return sums


def _interval(value: float, drawn: np.ndarray, level: float) -> Interval:
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(low), float(high))
