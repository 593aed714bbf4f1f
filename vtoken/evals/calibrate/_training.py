"""What the training of gates has in common: pictures kept back, batches, and Adam with a warm-up and a cosine
schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import cos, pi

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.samples import Sample


def kept_back(samples: Sequence[Sample], data: str) -> Tensor:
    """[S] bool: the questions about every fifth picture of `data`."""
    number = {image: k for k, image in enumerate(dict.fromkeys(sample.image for sample in samples))}
    if len(number) < 5:
        raise ConfigError(f"{data}: gates need questions about at least 5 pictures, one of which is kept back")
    return torch.tensor([number[sample.image] % 5 == 4 for sample in samples])


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of samples, pass after pass in another order, without end."""
    while True:
        yield from torch.randperm(count, generator=generator).split(size)


def fit(
    parameters: Sequence[Tensor],
    rate: float,
    warm_up: float,
    steps: int,
    order: Iterable[Tensor],
    backward: Callable[[Tensor], None],
    gate: tuple[int, int],
) -> None:
    """Adam on `parameters`; the rate rises linearly over the share `warm_up` of the steps and falls by a cosine.

    Args:
        order: indices of every batch.
        backward: adds up the gradients of a batch.
        gate: number of the gate, and how many there are; says how far the training is.
    """
    optimizer = torch.optim.Adam(parameters, lr=rate)
    warm = max(1, round(warm_up * steps))
    for step, index in zip(range(steps), order, strict=False):
        share = (step + 1) / warm if step < warm else (1 + cos(pi * (step - warm) / max(1, steps - warm))) / 2
        optimizer.param_groups[0]["lr"] = rate * share
        optimizer.zero_grad()
        backward(index)
        optimizer.step()
        say("gates", (gate[0] + (step + 1) / steps) / gate[1])
