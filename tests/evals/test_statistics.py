"""Paired statistics against closed forms, scipy and brute force."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from scipy import stats

from vtoken.errors import VtokenError
from vtoken.evals.statistics import agreement, mcnemar, paired, questions_needed


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (3, 9), (20, 20), (60, 31)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, won: int) -> None:
    expected = stats.binomtest(lost, lost + won, 0.5).pvalue if lost + won else 1.0
    assert mcnemar(lost, won) == mcnemar(won, lost) == pytest.approx(expected)


def test_percent_of_dense_by_hand() -> None:
    found = paired([1, 0, 1, 0], [1, 1, 1, 1])
    assert found.of_dense is not None and found.of_dense.value == 0.5
    assert found.difference.value == -0.5
    assert (found.lost, found.won, found.p) == (2, 0, 0.5)


def test_the_interval_holds_every_resample_of_a_tiny_set() -> None:
    """With three questions all 27 resamples can be listed."""
    mine, theirs = [0.2, 1.0, 0.4], [0.5, 0.9, 1.0]
    apart = np.subtract(mine, theirs)
    every = sorted(np.mean([apart[k] for k in drawn]) for drawn in product(range(3), repeat=3))
    found = paired(mine, theirs, resamples=20000).difference
    assert found.low == pytest.approx(every[0]) and found.high == pytest.approx(every[-1])
    assert paired(mine, theirs).p is None  # no right and wrong to count


def test_the_interval_has_its_level() -> None:
    """Of 200 experiments with a true difference of -0.1, about 95 % of the intervals hold it."""
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        dense = rng.random(300) < 0.9
        pruned = np.where(dense, rng.random(300) < 0.85, rng.random(300) < 0.35)
        found = paired(pruned, dense, resamples=300, seed=trial).difference
        hits += found.low <= -0.9 * 0.15 + 0.1 * 0.35 <= found.high
    assert 178 <= hits <= 199


def test_questions_on_one_picture_are_drawn_together() -> None:
    """Eight copies of every question tell no more than one."""
    rng = np.random.default_rng(1)
    mine, theirs = rng.integers(2, size=40), rng.integers(2, size=40)
    once = paired(mine, theirs).difference
    copies = paired(np.repeat(mine, 8), np.repeat(theirs, 8), clusters=np.repeat(np.arange(40), 8).tolist()).difference
    alone = paired(np.repeat(mine, 8), np.repeat(theirs, 8)).difference
    assert copies == pytest.approx(once)
    assert alone.high - alone.low < 0.5 * (copies.high - copies.low)


def test_questions_needed_reach_the_power() -> None:
    effect, discordant = 0.05, 0.15
    needed = questions_needed(effect, discordant)
    rng = np.random.default_rng(2)
    share = [(discordant + effect) / 2, (discordant - effect) / 2, 1 - discordant]
    seen = [mcnemar(lost, won) < 0.05 for lost, won, _ in rng.multinomial(needed, share, size=2000)]
    assert 0.74 < np.mean(seen) < 0.84  # the exact test is a little conservative
    assert questions_needed(0.01, discordant) > 20 * needed


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: paired([], []), "one score per question"),
        (lambda: paired([1], [1, 0]), "one score per question"),
        (lambda: paired([float("nan")], [1]), "finite"),
        (lambda: agreement(["a"], []), "as many answers"),
        (lambda: questions_needed(0.2, 0.1), "cannot be seen"),
        (lambda: questions_needed(0, 0.1), "cannot be seen"),
    ],
)
def test_bad_input_is_named(call, words: str) -> None:
    with pytest.raises(VtokenError, match=words):
        call()


def test_dense_without_a_right_answer_has_no_share() -> None:
    found = paired([0, 1], [0, 0])
    assert found.of_dense is None and found.won == 1


def test_agreement_ignores_case_and_outer_space() -> None:
    assert agreement(["Red ", "7", "no"], ["red", "7", "yes"]) == pytest.approx(2 / 3)
