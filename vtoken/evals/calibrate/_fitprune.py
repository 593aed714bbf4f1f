"""FitPrune's search: the least loss of attention that meets a budget of FLOPs, and how many tokens each layer drops
then."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry.decoder import decoder
from vtoken.evals.cost.geometry.shapes import Layers
from vtoken.session import wrapped
from vtoken.stages import Fact, Keep, Site, Stage, VisualTokens

STEP = 0.01  # at which the search for alpha stops, as the authors' does
MASSES = (Fact("cross_attention"), Fact("self_attention"))


@dataclass
class Sample:
    """One prompt.

    Attributes:
        mass: decoder layer -> sums of the attention (cross, self) after it in the dense model; without the last layer.
        alive: visual tokens in every layer of the current run.
    """

    mass: dict[int, tuple[float, float]] = field(default_factory=dict)
    alive: list[int] = field(default_factory=list)


class Losing(Stage):
    """Drops, after every layer, the tokens that are among the lowest of both attentions: as many of each as leave
    `1 - alpha` of the mass that the unpruned model has there. With alpha None nothing is dropped and the masses are
    recorded."""

    kind: ClassVar[Literal["pruner", "compressor"]] = "pruner"
    site: ClassVar[Site] = "decoder"
    alpha: float | None
    sample: Any

    def needs(self) -> tuple[Fact, ...]:
        return MASSES

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(range(1, depth))

    def select(self, tokens: VisualTokens) -> Keep:
        if len(tokens.lengths) != 1:
            raise ConfigError(f"the prompts must show one picture each, not {len(tokens.lengths)}")
        assert tokens.layer is not None
        values = [tokens.facts[fact].double() for fact in MASSES]
        if self.alpha is None:
            self.sample.mass[tokens.layer] = tuple(float(v.sum()) for v in values)
            stay = torch.ones_like(values[0], dtype=torch.bool)
        else:
            floors = [(1 - self.alpha) * mass for mass in self.sample.mass[tokens.layer]]
            spared = [removable(v, floor) for v, floor in zip(values, floors, strict=True)]
            stay = ~(spared[0] & spared[1])
        index = stay.nonzero()[:, 0]
        if not self.sample.alive:
            self.sample.alive.append(tokens.lengths[0])
        self.sample.alive.append(len(index))
        return Keep(index, (len(index),))


@dataclass(frozen=True)
class Fit:
    """A table of tokens to drop after each layer.

    Attributes:
        tokens: visual tokens of the picture that it is for.
        alpha: share of the attention that may be lost at a layer.
        reached: share of the visual tokens' FLOPs that was saved on the samples.
        spared: the share that the table saves; its counts are means rounded down.
    """

    table: tuple[int, ...]
    tokens: int
    alpha: float
    reached: float
    spared: float


def fit(model: Any, prompts: Iterable[Any], reduction: float, progress: Callable[[], None] = lambda: None) -> Fit:
    """Searches the smallest alpha that saves `reduction` of the FLOPs that visual tokens cost in the decoder.

    Args:
        prompts: model inputs, one picture each, all of equally many tokens.
        progress: called before every pass over the samples.

    Raises:
        ConfigError: pictures of several sizes, or a reduction that no alpha reaches.
    """
    given = list(prompts)
    samples = [Sample() for _ in given]
    stack = decoder(model.config.get_text_config())

    def runs(alpha: float | None) -> list[list[int]]:
        progress()
        for inputs, sample in zip(given, samples, strict=True):
            sample.alive.clear()
            with torch.inference_mode(), wrapped(model, [Losing(alpha=alpha, sample=sample)]):
                model.generate(**inputs, do_sample=False, max_new_tokens=1)
        return [list(sample.alive) for sample in samples]

    sizes = {counts[0] for counts in runs(None)}
    if len(sizes) != 1:
        raise ConfigError(
            f"the pictures have {min(sizes)} to {max(sizes)} visual tokens, but a table is for one number; give "
            "pictures of one size"
        )
    (tokens,) = sizes
    low, high, found = 0.0, 1.0, None
    while high - low > STEP:
        alpha = (low + high) / 2
        counts, reached = stopped(stack, runs(alpha), reduction)
        if reached < reduction:
            low = alpha
        else:
            high, found = alpha, (counts, reached)
    if found is None:
        raise ConfigError(f"a reduction of {reduction:.0%} cannot be reached on this model; ask for less")
    table = mean_losses(found[0])
    alive = [tokens - sum(table[:k]) for k in range(stack.depth)]
    return Fit(table, tokens, high, found[1], 1 - forecast(stack, alive) / forecast(stack, [tokens] * stack.depth))


def removable(values: Tensor, floor: float) -> Tensor:
    """[N] bool: the lowest of values [N], as many as leave at least `floor` of their sum; ties go to the lower
    index."""
    order = values.argsort(stable=True)
    left = values[order].flip(0).cumsum(0).flip(0)
    # left[i] is what stays when the first i are gone: all i with left[i] >= floor are allowed, the last one stays.
    return torch.zeros_like(values, dtype=torch.bool).index_fill(
        0, order[: max(0, int((left >= floor).sum()) - 1)], True
    )


def stopped(stack: Layers, alive: list[list[int]], reduction: float) -> tuple[list[list[int]], float]:
    """Tokens alive per sample and layer if none leave after the layer where the mean forecast is met, and the share of
    FLOPs that this saves."""
    spared = 0.0
    for last in range(stack.depth):
        counts = [row[: last + 1] + [row[last]] * (stack.depth - last - 1) for row in alive]
        costs = [(forecast(stack, row), forecast(stack, row[:1] * stack.depth)) for row in counts]
        spared = 1 - sum(cost for cost, _ in costs) / sum(full for _, full in costs)
        if spared >= reduction:
            break
    return counts, spared


def forecast(stack: Layers, alive: list[int]) -> int:
    """FLOPs of visual tokens alone: matrices, and attention among themselves."""
    return sum(stack.linear(n, layer) + 2 * stack.scores(n, n) for layer, n in enumerate(alive))


def mean_losses(alive: list[list[int]]) -> tuple[int, ...]:
    """What leaves after each layer on average, rounded down; nothing after the last."""
    losses = [[a - b for a, b in pairwise(row)] + [0] for row in alive]
    return tuple(sum(behind) // len(alive) for behind in zip(*losses, strict=True))
