"""How near a pruned model stays to the dense one on samples."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from vtoken.config import Pipeline
from vtoken.errors import ConfigError
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import encode
from vtoken.evals.shared.bars import say
from vtoken.evals.tune.relative_score import RelativeScore
from vtoken.evals.tune.samples import Sample

if TYPE_CHECKING:  # It needs lmms-eval.
    from vtoken.evals.tune.tasks import Tasks

Measure = Literal["agreement", "accuracy", "cosine"]


class Judge:
    """Scores pipelines on samples; the dense model answers once, when its answers are first needed.

    Args:
        measure: "agreement", the share of answers that equal the dense model's; "accuracy", the share that are right
            (both ignore case and outer space); or "cosine", the mean cosine of the last prompt token's final hidden
            state with the dense model's, which VFlowOpt is tuned with (its authors sum it over 30 samples).
        tasks: where the samples come from; accuracy is then a `RelativeScore`, by the tasks' own scorers.
        chunk: samples after which these scorers are asked again.
    """

    def __init__(
        self,
        generator: TextGenerator,
        samples: Sequence[Sample],
        measure: Measure,
        batch_size: int = 1,
        tasks: Tasks | None = None,
        chunk: int = 8,
    ) -> None:
        self.generator, self.samples, self.measure, self.batch_size = generator, list(samples), measure, batch_size
        self.tasks, self.chunk = tasks, chunk
        self._ask: Callable[[Sequence[Sample]], list[Any]] = self._hidden if measure == "cosine" else self._answers

    @cached_property
    def _reference(self) -> list[Any]:
        """The dense model's answer to every sample, or its state."""
        self.generator.use(None)
        return [each for batch in self._batches() for each in self._ask(batch)]

    @cached_property
    def relative(self) -> RelativeScore | None:
        """What scores accuracy on tasks."""
        return RelativeScore(self.tasks, self._reference) if self.measure == "accuracy" and self.tasks else None

    @cached_property
    def dense(self) -> float:
        """The dense model's own quality: 1 except for accuracy against given answers.

        Raises:
            ConfigError: it is 0.
        """
        if self.measure != "accuracy" or self.relative is not None:
            return 1.0
        right = [_same(said, s.answer or "") for said, s in zip(self._reference, self.samples, strict=True)]
        if not any(right):
            raise ConfigError(
                "the dense model answers nothing right, so no accuracy can be kept; take --quality agreement"
            )
        return sum(right) / len(right)

    @property
    def most(self) -> list[float]:
        """The highest score that each sample can have."""
        return [1.0] * len(self.samples) if self.relative is None else self.relative.most

    def quality(self, scores: Sequence[float]) -> float:
        """Of a pipeline, from the scores of all samples; to be asked before another pipeline is scored."""
        return sum(scores) / len(scores) if self.relative is None else self.relative.quality

    def scores(self, pipeline: Pipeline) -> Generator[list[float], None, None]:
        """Scores, batch by batch, or chunk by chunk with tasks; the model is dense again when this ends or is
        closed."""
        reference = self._reference  # before the pipeline is on
        self.generator.use(pipeline)
        try:
            if self.relative is not None:
                yield from self._scored_by_tasks(self.relative)
                return
            done = 0
            for batch in self._batches():
                yield self._score(batch, reference[done : done + len(batch)])
                done += len(batch)
        finally:
            self.generator.use(None)

    def _score(self, batch: Sequence[Sample], dense: Sequence[Any]) -> list[float]:
        wanted = [sample.answer or "" for sample in batch] if self.measure == "accuracy" else dense
        pairs = zip(self._ask(batch), wanted, strict=True)
        if self.measure == "cosine":
            return [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        return [float(_same(a, b)) for a, b in pairs]

    def _scored_by_tasks(self, relative: RelativeScore) -> Iterator[list[float]]:
        answers: list[str] = []
        given = 0
        for batch in self._batches():
            answers += self._answers(batch)
            if len(answers) == len(self.samples) or (relative.steady and len(answers) - given >= self.chunk):
                yield relative.of(answers)[given:]
                given = len(answers)

    def _batches(self) -> Iterator[list[Sample]]:
        """The samples in order, in batches of equal generation options."""
        batch: list[Sample] = []
        name = "dense" if self.generator.pipeline is None else self.generator.pipeline.name
        for done, sample in enumerate(self.samples):
            say(f"{name}: {done} of {len(self.samples)}")
            if batch and (len(batch) == self.batch_size or sample.options != batch[0].options):
                yield batch
                batch = []
            batch.append(sample)
        yield batch

    def _answers(self, batch: Sequence[Sample]) -> list[str]:
        return [reply.text for reply in self.generator.generate([s.prompt for s in batch], batch[0].options)]

    @torch.inference_mode()
    def _hidden(self, batch: Sequence[Sample]) -> list[Tensor]:
        """[D] of every sample, on the CPU."""
        model: Any = self.generator.model
        inputs = encode(self.generator.processor, [s.prompt for s in batch], model)
        out = model.generate(
            **inputs, do_sample=False, max_new_tokens=1, return_dict_in_generate=True, output_hidden_states=True
        )
        return list(out.hidden_states[0][-1][:, -1].float().cpu())


def _same(a: str, b: str) -> bool:
    return a.strip().lower() == b.strip().lower()
