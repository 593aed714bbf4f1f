"""The threshold of attention_exit: how much attention images get in every layer, and what the model answers if they
leave before it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from vtoken.compressors.decoder._exits import asked
from vtoken.compressors.decoder.attention_exit import AttentionExit
from vtoken.errors import VtokenError
from vtoken.evals.calibrate._exit_reference import ExitReference
from vtoken.evals.shared.samples import Sample, answer_of, continued, prepare
from vtoken.session import wrapped
from vtoken.stages import Keep, VisualTokens, keep_all

ANSWER = 64  # tokens of an answer that count


@dataclass(frozen=True)
class Seen:
    """S samples at the E decoder layers before which the stage may let images leave; they end with the last layer.

    Attributes:
        heard: [S, E] the attention that the stage compares with its threshold; infinite where no token is asked.
        same: [S, E + 1] whether the answer is the dense model's if images leave there; in the last column they stay.
        right: [S, E + 1] whether it is the sample's answer, token by token; None if a sample has none.
        first: the first of the layers.
        patience: of the stage, layers in a row below the threshold.
    """

    heard: Tensor
    same: Tensor
    right: Tensor | None
    first: int
    patience: int

    def since(self, first: int) -> Seen:
        """The same for a stage that asks from a later layer on."""
        k = first - self.first
        right = None if self.right is None else self.right[:, k:]
        return Seen(self.heard[:, k:], self.same[:, k:], right, first, self.patience)


@dataclass(frozen=True)
class Point:
    """A threshold and what it does.

    Attributes:
        agreement: share of answers that stay the dense model's.
        accuracy: right answers, as a share of the dense model's; None without answers, or where that gives none.
        mean_layer: mean of the layer before which images leave, which is the model's depth if they stay.
    """

    threshold: float
    agreement: float
    accuracy: float | None
    mean_layer: float


class Recorder(AttentionExit):
    """Records the attention that the stage compares with its threshold; no image leaves."""

    noted: Any

    def select(self, tokens: VisualTokens) -> Keep:
        self.noted.append(self.heard(tokens)[0].item() if asked(tokens)[0] else math.inf)
        return keep_all(tokens)


def see(model: Any, processor: Any, samples: Sequence[Sample], stage: AttentionExit) -> Seen:
    """Runs every sample once densely, and on text alone from every layer on that the stage asks at."""
    layers = stage.layers(model.config.get_text_config().num_hidden_layers)
    heard, same, right = [], [], []
    for sample in samples:
        prompt, noted = prepare(model, processor, sample), list[float]()
        with wrapped(model, [Recorder(**stage.model_dump(), noted=noted)]), torch.no_grad():
            said = model.generate(**prompt, do_sample=False, max_new_tokens=ANSWER)[0, prompt["input_ids"].shape[1] :]
        heard.append(noted)
        same.append([*keeps(model, prompt, said, layers), True])
        if sample.answer is not None:
            wanted = answer_of(model, processor, sample, prompt, ANSWER)
            known = torch.equal(wanted, said)
            right.append(same[-1] if known else [*keeps(model, prompt, wanted, layers), False])
    answered = torch.tensor(right) if len(right) == len(same) else None
    return Seen(torch.tensor(heard, dtype=torch.float64), torch.tensor(same), answered, layers[0], stage.patience)


def keeps(model: Any, prompt: dict[str, Tensor], answer: Tensor, layers: Sequence[int]) -> list[bool]:
    """Whether greedy decoding gives this answer if images leave before each of the layers."""
    run = ExitReference(model, continued(prompt, answer))
    return [bool((run.without(k)[-len(answer) - 1 : -1].argmax(1) == answer).all()) for k in layers]


def curve(seen: Seen) -> list[Point]:
    """What every threshold does, ascending: there is one between every two values of attention. At the first no image
    leaves."""
    values = [0.0, *seen.heard[seen.heard <= 1].unique().tolist()]
    return [_point(seen, between(a, b)) for a, b in pairwise([*values, 1.0]) if a < b] or [_point(seen, 1.0)]


def between(low: float, high: float) -> float:
    """A number of few digits above `low` and below `high`, near the middle."""
    middle = (low + high) / 2
    return next((n for n in (round(middle, digits) for digits in range(2, 18)) if low < n < high), middle)


def leaves_at(heard: Tensor, threshold: float, patience: int) -> Tensor:
    """[S] the column of heard [S, E] at which images leave, E where they stay."""
    calm = (heard < threshold).unfold(1, patience, 1).all(-1)
    never = torch.ones(len(heard), heard.shape[1] + 1, dtype=torch.bool)
    never[:, :-1] = False
    never[:, patience - 1 : -1] = calm
    return never.int().argmax(1)


def _point(seen: Seen, threshold: float) -> Point:
    at = leaves_at(seen.heard, threshold, seen.patience)[:, None]
    accuracy = None
    if seen.right is not None and seen.right[:, -1].any():
        accuracy = (seen.right.gather(1, at).sum() / seen.right[:, -1].sum()).item()
    agreement = seen.same.gather(1, at).double().mean().item()
    return Point(threshold, agreement, accuracy, seen.first + at.double().mean().item())


def search(seen: Seen, tried: Sequence[int], kind: str, target: float, depth: int) -> tuple[int, Point, list[Point]]:
    """The best of the first layers `tried`, its threshold, and its curve.

    Of the layers that meet a share of answers it is the one where images leave earliest; of those that meet a mean
    layer the one where most answers stay; of equals the later one.

    Raises:
        VtokenError: no layer meets the target; with the reason of the first one.
    """
    found, problems = [], []
    for first in [k for k in tried if depth - k >= seen.patience]:
        points = curve(seen.since(first))
        try:
            found.append((first, choose(points, kind, target, depth), points))
        except VtokenError as error:
            problems.append(error)
    if not found:
        raise problems[0]
    gain = (lambda point: point.agreement) if kind == "mean_layer" else (lambda point: -round(point.mean_layer, 9))
    return max(found, key=lambda f: (gain(f[1]), f[0]))


def choose(points: Sequence[Point], kind: str, target: float, depth: int) -> Point:
    """The largest threshold such that it and all smaller ones keep the share `target` of `kind`; for a mean layer the
    smallest threshold that reaches it.

    Raises:
        VtokenError: no threshold does, or no share of right answers is known.
    """
    if kind == "mean_layer":
        for point in points:
            if point.mean_layer <= target:
                return point
        raise VtokenError(
            f"images leave before layer {points[-1].mean_layer:.2f} at the earliest, not {target:g}; lower --first, "
            "or --patience"
        )
    if points[0].accuracy is None and kind == "accuracy":
        raise VtokenError(
            "the dense model gives none of the answers word for word, so no accuracy can be kept; use --agreement"
        )
    worse = next((k for k, point in enumerate(points) if getattr(point, kind) < target), len(points))
    if worse and points[worse - 1].mean_layer < depth:
        return points[worse - 1]
    reason = f"the next one leaves {getattr(points[worse], kind):.1%}" if worse < len(points) else "nobody was asked"
    raise VtokenError(
        f"no threshold that lets an image go keeps {kind} at {target:.1%}: {reason}; this model reads its images to "
        "the end, or raise --first, or ask for less"
    )
