"""Accuracy on lmms-eval's tasks, by their own metrics, as a share of the dense model's."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from vtoken.errors import ConfigError
from vtoken.evals.lmms.suites import KNOWN

if TYPE_CHECKING:  # It needs lmms-eval.
    from vtoken.evals.tune.tasks import Grades, Tasks


class RelativeScore:
    """The mean over tasks of (metric / the dense model's metric), so that dense has 1.

    Args:
        said: the dense model's answers.

    Attributes:
        base: task -> the dense model's metric.
        values: task -> metric of the answers scored last, if all samples were among them.
        most: the highest score of each sample, on a scale on which the mean over samples is the mean over tasks.
        steady: the metrics are means of numbers between 0 and 1, one per document, so that a part of the answers says
            something about all.
    """

    def __init__(self, tasks: Tasks, said: Sequence[str]) -> None:
        self.tasks = tasks
        dense = tasks.grade(said)
        self.base = self.values = dense.values
        for name, value in self.base.items():
            if value <= 0:
                raise ConfigError(
                    f"the dense model's score on task {name} is {value:g}, of which no share can be kept; take "
                    "--quality agreement"
                )
        counts = Counter(tasks.of)
        self.most = [len(tasks.of) / (len(counts) * counts[name] * self.base[name]) for name in tasks.of]
        self.steady = False
        if not any(name in KNOWN and KNOWN[name].judge for name in tasks.names):
            # The dense answers alone do not show it: where all are right, an F1 score is their mean as well.
            half = tasks.grade([text if k % 2 else "" for k, text in enumerate(said)])
            self.steady = self._are_means(dense) and self._are_means(half)

    def _are_means(self, grades: Grades) -> bool:
        for name, value in grades.values.items():
            own = [each for each, of in zip(grades.documents, self.tasks.of, strict=True) if of == name]
            known = [each for each in own if each is not None and 0 <= each <= 1]
            if len(known) < len(own) or not math.isclose(fmean(known), value, rel_tol=1e-6, abs_tol=1e-9):
                return False
        return True

    def of(self, answers: Sequence[str]) -> list[float]:
        """Of answers to the first samples; to all of them where the metrics are not steady."""
        grades = self.tasks.grade(answers)
        self.values = grades.values
        if not self.steady:
            return [self.quality] * len(answers)
        return [most * (own or 0.0) for most, own in zip(self.most, grades.documents[: len(answers)], strict=False)]

    @property
    def quality(self) -> float:
        """Of what was scored last."""
        return fmean(self.values[name] / self.base[name] for name in self.base)
