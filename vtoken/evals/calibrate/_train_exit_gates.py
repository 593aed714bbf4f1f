"""DyVTE's gates: which exits would have changed nothing, and how gates learn to predict it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from vtoken.compressors.decoder._gates import Gate, logits, question
from vtoken.evals.calibrate._exit_reference import ExitReference
from vtoken.evals.calibrate._training import batches, fit
from vtoken.evals.shared.bars import say
from vtoken.evals.shared.options import Options, option
from vtoken.evals.shared.samples import Sample, answer_of, continued, prepare

AGREEMENT, LOSS = 0.99, 1.03  # the authors' bounds
ANSWER = 64  # tokens of an answer that count
WARM_UP = 0.03


class Training(Options):
    """How gates are trained, by default as the authors do: Adam, a cosine schedule after a warm-up of 3%."""

    hidden: int = option(2048, "width of a gate", gt=0)
    epochs: int = option(1, "passes over the data", gt=0)
    batch: int = option(128, "questions per step", gt=0)
    rate: float = option(6e-5, "learning rate", "R", gt=0)
    seed: int = option(0, "of weights and order")


@dataclass(frozen=True)
class Table:
    """What was seen of S samples, for the gates before decoder layers 1 to L - 1.

    Attributes:
        shown: [S, L - 1, 2 D] the input of each gate.
        leave: [S, L - 1] whether an exit before that layer changes nothing.
    """

    shown: Tensor
    leave: Tensor

    def rows(self, index: Tensor) -> Table:
        return Table(self.shown[index], self.leave[index])


def table(model: Any, processor: Any, samples: Sequence[Sample]) -> Table:
    """Runs every sample once densely, and from every layer on once more without images.

    An exit changes nothing, by the authors' rule, if more than 99% of the answer's tokens keep their most likely
    prediction and the answer's loss stays below 1.03 times that of the full run; the answer is given, token by token.
    """
    shown, leave = [], []
    for done, sample in enumerate(samples, 1):
        prompt = prepare(model, processor, sample)
        answer = answer_of(model, processor, sample, prompt, ANSWER)
        run = ExitReference(model, continued(prompt, answer))
        asked = len(run.columns) - len(answer)
        full = run.full[asked - 1 : -1].float()
        layers = range(1, len(run.entering))
        shown.append(torch.stack([question(run.entering[k][run.behind : asked]) for k in layers]).cpu())
        found = [unchanged(run.without(k)[asked - 1 : -1].float(), full, answer) for k in layers]
        leave.append(torch.tensor(found))
        say("questions", done / len(samples))
    return Table(torch.stack(shown), torch.stack(leave))


def unchanged(now: Tensor, full: Tensor, answer: Tensor) -> bool:
    """Whether logits [A, V] say the same of an answer [A] as those of the full run."""
    agreement = (now.argmax(1) == full.argmax(1)).double().mean()
    return bool(agreement > AGREEMENT) and bool(cross_entropy(now, answer) < LOSS * cross_entropy(full, answer))


def train(seen: Table, asked: Training) -> dict[int, Gate]:
    """Gates by the layer before which they are asked, trained one after the other: each has a loss of its own
    (cross-entropy of stay and leave)."""
    return {k: _gate(seen, asked, k) for k in layers_of(seen)}


def layers_of(seen: Table) -> range:
    """The layers before which there is a gate."""
    return range(1, seen.shown.shape[1] + 1)


def _gate(seen: Table, asked: Training, layer: int) -> Gate:
    shown, leave = seen.shown[:, layer - 1], seen.leave[:, layer - 1].long()
    generator = torch.Generator().manual_seed(1000 * asked.seed + layer)
    first, second = torch.empty(asked.hidden, shown.shape[1]), torch.empty(2, asked.hidden)
    for matrix in (first, second):
        torch.nn.init.xavier_uniform_(matrix, generator=generator).requires_grad_()
    order = batches(len(shown), asked.batch, generator)
    steps = asked.epochs * -(-len(shown) // asked.batch)

    def backward(index: Tensor) -> None:
        cross_entropy(logits((first, second), shown[index]), leave[index]).backward()

    fit([first, second], asked.rate, WARM_UP, steps, order, backward, (layer - 1, len(layers_of(seen))))
    return first.detach(), second.detach()


@torch.no_grad()
def judge(gates: dict[int, Gate], seen: Table) -> dict[str, list[float]]:
    """How gates do on samples.

    Returns:
        `stay` [L]: share of samples whose images each layer still sees. Of the gates before layers 1 to L - 1:
        `may_leave`, share of samples that an exit there does not change; `accuracy`; `harmful`, share of all samples
        that leave there although it changes something.
    """
    out = torch.stack([logits(gates[k], seen.shown[:, k - 1]).diff(dim=1)[:, 0] > 0 for k in layers_of(seen)], 1)
    stay = (out.cumsum(1) == 0).double()
    first = out & (out.cumsum(1) == 1)
    return {
        "stay": [1.0, *stay.mean(0).tolist()],
        "may_leave": seen.leave.double().mean(0).tolist(),
        "accuracy": (out == seen.leave).double().mean(0).tolist(),
        "harmful": (first & ~seen.leave).double().mean(0).tolist(),
    }
