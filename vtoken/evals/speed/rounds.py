"""What measurements share: greedy answers of a fixed length, rounds in which everything takes its turn, and the time of
the first token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria

from vtoken.evals.shared.options import BenchOptions
from vtoken.hooks.state.handle import Handle

Subject = TypeVar("Subject")


@contextmanager
def greedy(model: Any, new_tokens: int) -> Iterator[None]:
    """Whatever the checkpoint says about sampling and stopping must not decide what is measured."""
    handle = Handle()
    handle.set(model, "generation_config", GenerationConfig(do_sample=False, max_new_tokens=new_tokens))
    try:
        yield
    finally:
        handle.release()


def rounds(asked: BenchOptions, subjects: Sequence[Subject]) -> Iterator[tuple[int, Subject]]:
    """(round, subject), each once per round, in an order that rotates from round to round; rounds below 0 warm up."""
    for turn in range(-asked.warmup, asked.repeats):
        shift = turn % len(subjects)
        for subject in (*subjects[shift:], *subjects[:shift]):
            yield turn, subject


class FirstToken(StoppingCriteria):
    """Never stops `generate`; notes the time of the first token."""

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now, self.at = now, None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.at is None:
            self.at = self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
