"""How fast: dense, pipelines and their oracles, interleaved in one process.

A sample is one greedy `generate` of a batch of random prompts of one shape, with a fixed number of new tokens. Wrapping
is not timed, nor a call for one token right before each sample, which warms the caches.

The *oracle* of a pipeline is the same unwrapped model on a prompt that is short already: what pruning would cost if
deciding and dropping were free. It is one stock `generate` with only the kept placeholders, and with the positions and
padding that the pipeline produces. Vision tower and projector run in full; then the model gets the features that were
kept (DeepStack's too) instead of theirs, which stay in memory. M-RoPE positions are computed for the full prompt, as in
the pipeline. So the oracle pays what `generate` always costs, and pipeline / oracle is vtoken's own price: hooks,
facts, scores, top-k, gather, masks. Both run the same decoder computation and give the same tokens. An oracle exists
where all stages act at site `tokens`: elsewhere the sequence gets shorter on the way, and no short prompt is
equivalent.

*Break-even* is the number of visual tokens, over the whole batch, that a pipeline must drop to pay for itself:
ceil(overhead / gain), overhead = TTFT(pipeline) - TTFT(oracle), gain = (TTFT(dense) - TTFT(oracle)) / tokens dropped,
all medians of per-round differences. A cost that grows with the tokens is taken as fixed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean
from typing import Any

import torch

from vtoken import registry
from vtoken.config import load
from vtoken.evals.cost.cache import chooses
from vtoken.evals.cost.flops import account
from vtoken.evals.shared.machine import machine
from vtoken.evals.shared.options import BenchOptions, Workload
from vtoken.evals.speed.inputs import random_prompt
from vtoken.evals.speed.rounds import greedy, rounds
from vtoken.evals.speed.timing import Runner, Sample, Subject
from vtoken.evals.statistics import Spread, spread

PARTS = ("vision", "stages", "ttft", "decode", "end_to_end")
COMPARED = ("ttft", "decode", "end_to_end")
SHOWN = ("batch", "images", "frames", "image_size", "text_tokens", "seed")  # options that a prompt is drawn from
Spreads = dict[str, Spread | None]  # by part, None where the part does not exist


@dataclass(frozen=True)
class Row:
    """One pipeline, or dense.

    Attributes:
        visual_tokens: of the whole batch, in the decoder's last layer; `visual_entry` in its first, `visual_average`
            over all of them.
        kv_bytes: keys and values of the whole batch after prefill; `kv_bytes_end` at the end of the answer.
        kv_bytes_read: of one batch row, what a step reads of its cache, the mean over the answer: all of it, or, with
            stages that choose at every token, as the FLOPs account has it. None without steps, or if neither is known.
        peak_bytes: largest of all rounds, None on a CPU.
        to_dense, to_oracle: per-round ratios pipeline / dense and pipeline / oracle.
        overhead: milliseconds of TTFT above the oracle's.
        break_even: visual tokens to drop before the pipeline pays, None where it cannot be computed.
        no_oracle: why there is none, or None.
        stood_aside: stages that did nothing -> why; what is measured is the model without them.
        density: stages of site attention that acted -> share of the causal blocks that they computed. Times of a method
            that chooses by what it sees are those at this density, whatever the weights.
    """

    name: str
    visual_tokens: int
    visual_entry: int
    visual_average: float
    kv_bytes: int
    milliseconds: Spreads
    peak_bytes: int | None
    kv_bytes_end: int = 0
    kv_bytes_read: int | None = None
    to_dense: Spreads | None = None
    oracle: Spreads | None = None
    to_oracle: Spreads | None = None
    overhead: Spread | None = None
    break_even: int | None = None
    no_oracle: str | None = None
    stood_aside: dict[str, str] = field(default_factory=dict)
    density: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Bench:
    """Rows, the first of which is dense.

    Attributes:
        drift: dense end to end, median of the second half of the rounds / of the first; None with one round.
        conditions: what a reader needs to run it again.
    """

    rows: tuple[Row, ...]
    drift: float | None
    conditions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `json.dumps` takes."""
        return asdict(self)


@torch.inference_mode()
def bench(model: Any, pipelines: Sequence[Any], *, oracles: bool = True, pictures: Any = None, **options: Any) -> Bench:
    """Measures dense, every pipeline and every oracle once per round, in an order that rotates from round to round.

    Args:
        model: a stock model that is not wrapped; it is left as it was.
        pipelines: anything that `vtoken.wrap` takes.
        oracles: whether they are measured.
        pictures: as `random_prompt` takes them.
        options: fields of `BenchOptions`. End-of-sequence is disabled; families that resize every picture ignore its
            size.

    Raises:
        ConfigError: an option out of bounds, a pipeline that does not read, or an image size that the family's
            processor refuses.
        UnsupportedError: a family without random prompts, a wrapped model, or a stage the model cannot serve.
    """
    asked = BenchOptions.given(**options)
    parsed = [load(pipeline) for pipeline in pipelines]
    adapter = registry.adapter(model.config.model_type)(model)
    shape = {name: getattr(asked, name) for name in SHOWN}
    runner = Runner(adapter, random_prompt(adapter, pictures=pictures, **shape))
    with greedy(model, asked.new_tokens):
        subjects = [runner.prepare(pipeline) for pipeline in (None, *parsed)]
        if not oracles:
            subjects = [replace(subject, oracle=None, no_oracle=None) for subject in subjects]
        for turn, subject in rounds(asked, subjects):
            runner.round(subject, oracle_first=turn % 2 == 1, count=turn >= 0)
    dense = subjects[0]
    total = [sample.end_to_end for sample in dense.samples]
    half = asked.repeats // 2
    drift = spread(total[-half:]).median / spread(total[:half]).median if half else None
    conditions = {**machine(model), **asked.model_dump(exclude_none=True), "prompt": runner.shape}
    rows = (
        replace(row(subject, dense), kv_bytes_read=bytes_read(subject, model, asked, drawn=pictures is None))
        for subject in subjects
    )
    return Bench(tuple(rows), drift, conditions)


def bytes_read(subject: Subject, model: Any, asked: BenchOptions, drawn: bool) -> int | None:
    """Row.kv_bytes_read; `drawn`: the pictures have the size that the account takes them to have."""
    steps = subject.cached[1:]
    if not steps or subject.pipeline is None or not any(map(chooses, subject.pipeline.stages)):
        return round(fmean(steps) / asked.batch) if steps else None
    if not drawn:
        return None
    work = asked.model_dump(include=set(Workload.model_fields))
    return account(model.config, subject.pipeline, dtype_bytes=model.dtype.itemsize, **work).kv_bytes_read


def row(subject: Subject, dense: Subject) -> Row:
    """The statistics of one subject; only its oracle's when it has one."""
    name = subject.pipeline.name if subject.pipeline else "dense"
    peaks = [sample.peak_bytes for sample in subject.samples if sample.peak_bytes is not None]
    base = Row(
        name,
        visual_tokens=subject.layers[-1],
        visual_entry=subject.layers[0],
        visual_average=sum(subject.layers) / len(subject.layers),
        kv_bytes=subject.cached[0],
        kv_bytes_end=subject.cached[-1],
        milliseconds=parts(subject.samples),
        peak_bytes=max(peaks, default=None),
        no_oracle=subject.no_oracle,
        stood_aside=subject.aside,
        density=subject.density,
    )
    if subject is dense:
        return base
    base = replace(base, to_dense=ratios(subject.samples, dense.samples))
    if subject.oracle is None:
        return base
    pairs = list(zip(subject.samples, subject.ideal, dense.samples, strict=True))
    overhead = spread([own.ttft - ideal.ttft for own, ideal, _ in pairs])
    gain = spread([full.ttft - ideal.ttft for _, ideal, full in pairs]).median
    return replace(
        base,
        oracle=parts(subject.ideal),
        to_oracle=ratios(subject.samples, subject.ideal),
        overhead=overhead,
        break_even=break_even(overhead.median, gain, dense.layers[-1] - subject.layers[-1]),
    )


def parts(samples: Sequence[Sample]) -> Spreads:
    found = {part: [getattr(sample, part) for sample in samples] for part in PARTS}
    return {part: None if None in values else spread(values) for part, values in found.items()}


def ratios(samples: Sequence[Sample], others: Sequence[Sample]) -> Spreads:
    """Of samples[i] / others[i], for the parts that all variants have."""
    found: Spreads = {}
    for part in COMPARED:
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(samples, others, strict=True)]
        found[part] = None if None in pairs[0] else spread([a / b for a, b in pairs])
    return found


def break_even(overhead: float, gain: float, dropped: int) -> int | None:
    """Tokens to drop before milliseconds of overhead are won back, where dropping `dropped` gains `gain` milliseconds.

    None where nothing was dropped or nothing gained; at least 1.
    """
    return max(1, math.ceil(overhead * dropped / gain)) if dropped > 0 and gain > 0 else None
