"""lmms-eval's tasks in a search: what they ask, and what their own scorers say to answers."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.lmms.harness import Harness, Scored
from vtoken.evals.lmms.prompts import Prompt, from_chat
from vtoken.evals.lmms.suites import document_score, expand
from vtoken.evals.shared.options import FRAMES
from vtoken.evals.tune.samples import Sample

Key = tuple[str, str, int, int]  # task as it was asked for, its leaf, document, and which answer to it


class Speaker(lmms):
    """Stands in for a model: records what lmms-eval asks, and replies with the answers it was given, else with none."""

    is_simple = False
    batch_size = 1
    device = "cpu"

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.heard: dict[Key, tuple[Prompt, dict[str, Any]]] = {}
        self.says: dict[Key, str] = {}
        self.requests: list[Any] = []

    def about(self) -> dict[str, Any]:
        return {}

    def clean(self) -> None:
        """Nothing to free."""

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        answers, seen = [], Counter[tuple[str, int]]()
        for request in requests:
            _, messages, options, doc, task, split = request.args
            key = self.name, task, int(doc), seen[task, doc]
            seen[task, doc] += 1
            if key not in self.heard:
                prompt = from_chat(messages(self.task_dict[task][split][doc]), FRAMES)
                self.heard[key] = prompt, dict(options)
            answers.append(GenerationResult(self.says.get(key, ""), TokenCounts(0, 0)))
        return answers

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        raise UnsupportedError("only tasks that are answered by generating text are served")

    generate_until_multi_round = loglikelihood


@dataclass(frozen=True)
class Grades:
    """Scores of answers.

    Attributes:
        values: task -> its own metric over all its documents.
        documents: of every sample, its document's own number in that metric; None where the metric has none.
    """

    values: dict[str, float]
    documents: tuple[float | None, ...]


class Tasks:
    """Tasks that are asked and scored without a model at hand.

    Args:
        names: of tasks, groups and suites.
        limit: first documents of each.
        folders: with tasks of the caller's.

    Attributes:
        samples: everything they ask, one task after the other.
        of: the task of every sample.
    """

    def __init__(self, names: Sequence[str], limit: int | None, folders: Sequence[Path] = ()) -> None:
        self.names, self.limit = expand(names), limit
        self._speaker, self._harness = Speaker(), Harness(self.names, folders)
        self._scored()
        self.samples = [Sample(prompt, None, options) for prompt, options in self._speaker.heard.values()]
        self.of = [key[0] for key in self._speaker.heard]

    def grade(self, answers: Sequence[str]) -> Grades:
        """Of answers to the first samples; the others count as answered with nothing."""
        self._speaker.says = dict(zip(self._speaker.heard, answers, strict=False))
        with redirect_stderr(StringIO()):  # Bars, and what scorers print, would come again with every trial.
            every = self._scored()
        values: dict[str, float] = {}
        found: dict[tuple[str, str, int], float | None] = {}
        for name, scored in every.items():
            metric = scored.metric or ""
            if scored.value is None:
                raise ConfigError(f"the scorer of task {name} gives no number to keep; take --quality agreement")
            if not all(leaf.higher_is_better.get(metric, True) for leaf in scored.leaves.values()):
                raise ConfigError(f"{metric} of task {name} is better when it is lower; take --quality agreement")
            values[name] = scored.value
            for leaf, about in scored.leaves.items():
                for sample in about.samples:
                    found[name, leaf, int(sample["doc_id"])] = document_score(name, sample.get(metric))
        return Grades(values, tuple(found[key[:3]] for key in self._speaker.heard))

    def _scored(self) -> dict[str, Scored]:
        found = {}
        with tempfile.TemporaryDirectory() as folder:  # Some scorers leave files.
            for name in self.names:
                self._speaker.name = name
                found[name] = self._harness.run(self._speaker, name, self.limit, Path(folder) / name)
        return found
