"""How fast with drafts: plain decoding and every draft once per round, in one process.

A sample is one greedy `generate` of one random prompt with a fixed number of new tokens. Making the draft is not timed,
nor a call for two tokens right before each sample, which warms the caches. How many drafts are accepted depends on the
weights and on what the prompt shows, and with it the time: on random weights both say nothing about a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from transformers import StoppingCriteriaList

from vtoken import registry
from vtoken.config import Pipeline, load
from vtoken.drafts import acceptance, drafting
from vtoken.errors import ConfigError
from vtoken.evals.shared.machine import machine
from vtoken.evals.shared.options import BenchOptions
from vtoken.evals.speed.inputs import random_prompt
from vtoken.evals.speed.latency import SHOWN
from vtoken.evals.speed.rounds import FirstToken, greedy, rounds
from vtoken.evals.statistics import Spread, spread
from vtoken.hooks.state.run import Clock


@dataclass(frozen=True)
class Draft:
    """One pipeline of a draft.

    Attributes:
        acceptance: share of the drafted tokens that the target accepted; per_step: tokens per forward of the target
            after its prefill.
        decode: milliseconds per token after the first; the draft's own prefill is part of it.
        to_plain: per-round ratios, drafted / plain, of decoding and of the whole call.
        same: every answer was that of plain decoding, token for token. In low precision a tie may fall either way.
    """

    name: str
    acceptance: float
    per_step: float
    decode: Spread
    to_plain: dict[str, Spread]
    same: bool


@dataclass(frozen=True)
class Drafted:
    """What was measured; `plain`: milliseconds per token after the first, without drafts."""

    plain: Spread
    rows: tuple[Draft, ...]
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return asdict(self)


@dataclass
class _Samples:
    pipeline: Pipeline | None
    decode: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    counts: tuple[float, float] = (0, 0)
    ids: list[Any] = field(default_factory=list)


@torch.inference_mode()
def check(asked: BenchOptions) -> None:
    """Refuses several prompts and short answers, before a model is loaded."""
    if asked.batch > 1 or asked.new_tokens < 3:
        raise ConfigError(
            "drafts are verified one prompt at a time, from the second new token on: batch 1, 3 new tokens"
        )


def measure(
    model: Any, pipelines: Sequence[Any], other: Any = None, *, pictures: Any = None, **options: Any
) -> Drafted:
    """Measures.

    Args:
        model: the target, a stock model; left as it was.
        pipelines: of drafts, as `vtoken.draft` takes them.
        other: the checkpoint that drafts; None: the model itself.
        pictures: as `random_prompt` takes them.
        options: fields of `BenchOptions`; one prompt at a time, three or more new tokens.

    Raises:
        ConfigError: an option out of bounds, or a pipeline that does not read.
        UnsupportedError: as `vtoken.draft` raises it.
    """
    asked = BenchOptions.given(**options)
    check(asked)
    adapter = registry.adapter(model.config.model_type)(model)
    prompt = random_prompt(adapter, pictures=pictures, **{name: getattr(asked, name) for name in SHOWN})
    samples = [_Samples(None), *(_Samples(load(pipeline)) for pipeline in pipelines)]
    with greedy(model, asked.new_tokens):
        for turn, each in rounds(asked, samples):
            _sample(model, other, prompt.inputs, each, count=turn >= 0)
    plain, *drafts = samples
    conditions = {**machine(model), **asked.model_dump(exclude_none=True)}
    return Drafted(spread(plain.decode), tuple(_row(each, plain) for each in drafts), conditions)


def _sample(model: Any, other: Any, inputs: dict[str, Any], of: _Samples, *, count: bool) -> None:
    clock = Clock(model.device)
    with nullcontext() if of.pipeline is None else drafting(model, other, of.pipeline) as draft:
        more = {} if draft is None else {"assistant_model": draft}
        model.generate(**inputs, **more, max_new_tokens=2)
        first = FirstToken(clock.now)
        start = clock.now()
        ids = model.generate(**inputs, **more, stopping_criteria=StoppingCriteriaList([first]))
        end = clock.now()
        clock.wait()
        if draft is not None:
            found = acceptance(draft)
            of.counts = found.share, found.per_step
    if count:
        steps = model.generation_config.max_new_tokens - 1
        of.decode.append(clock.between(first.at, end) / steps)
        of.whole.append(clock.between(start, end))
        of.ids.append(ids)


def _row(own: _Samples, plain: _Samples) -> Draft:
    assert own.pipeline is not None
    pairs = {"decode": (own.decode, plain.decode), "end_to_end": (own.whole, plain.whole)}
    ratios = {part: spread([a / b for a, b in zip(*both, strict=True)]) for part, both in pairs.items()}
    same = all(torch.equal(a, b) for a, b in zip(own.ids, plain.ids, strict=True))
    return Draft(own.pipeline.name, *own.counts, spread(own.decode), ratios, same)
