"""How fast: dense, pipelines and their oracles, interleaved in one process.

One sample is one greedy `generate` of a batch of random prompts of one shape, with a fixed number of new tokens. Wrapping
is not timed, nor a call for one token right before each sample, which warms the caches.

The *oracle* of a pipeline is the same unwrapped model on a prompt that is short already: what pruning would cost if
deciding and dropping were free. It is one stock `generate` on a prompt with only the kept placeholders, with the positions
and padding that the pipeline produces; the vision tower and projector run in full, and instead of their features the model
gets those that were kept (DeepStack's too), while the tower's output stays in memory; M-RoPE positions are computed for the
full prompt, as the pipeline has them computed. So it pays what `generate` always
costs, and pipeline / oracle is vtoken's own price: hooks, facts, scores, top-k, gather, masks. It runs the same decoder
computation, hence gives the same tokens. It exists where all stages act at site `tokens`: elsewhere the sequence is
shortened on the way and no short prompt is equivalent.

*Break-even* is the number of visual tokens, over the whole batch, that a pipeline must drop to pay for itself:
ceil(overhead / gain), overhead = TTFT(pipeline) - TTFT(oracle), gain = (TTFT(dense) - TTFT(oracle)) / tokens dropped,
all medians of per-round differences. A cost that grows with the tokens is taken as fixed.
"""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from typing import Any

import torch
import transformers
from transformers import GenerationConfig

import vtoken
from vtoken import registry
from vtoken.config import load
from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry import ImageSize
from vtoken.evals.pictures.demo import processor_name
from vtoken.evals.speed.inputs import random_prompt
from vtoken.evals.speed.timing import Runner, Sample, Subject
from vtoken.hooks.state.handle import Handle

PARTS = ("vision", "stages", "ttft", "decode", "end_to_end")
COMPARED = ("ttft", "decode", "end_to_end")


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over the rounds."""

    median: float
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One pipeline, or dense.

    Attributes:
        visual_tokens: of the whole batch, in the decoder's last layer; `visual_entry` in its first, `visual_average` over all of them.
        kv_bytes: keys and values of the whole batch after prefill.
        milliseconds, oracle: part -> spread; a part is None where it does not exist.
        peak_bytes: largest of all rounds, None on a CPU.
        to_dense, to_oracle: part -> spread of the per-round ratios pipeline / dense and pipeline / oracle.
        overhead: milliseconds of TTFT above the oracle's.
        break_even: visual tokens to drop before the pipeline pays, None where it cannot be computed.
        no_oracle: why there is none, or None.
        stood_aside: stages that did nothing -> why; what is measured is the model without them.
        density: stages of site attention that acted -> share of the causal blocks that they computed. Times of a method that chooses by
            what it sees are those at this density, whatever the weights.
    """

    name: str
    visual_tokens: int
    visual_entry: int
    visual_average: float
    kv_bytes: int
    milliseconds: dict[str, Spread | None]
    peak_bytes: int | None
    to_dense: dict[str, Spread | None] | None = None
    oracle: dict[str, Spread | None] | None = None
    to_oracle: dict[str, Spread | None] | None = None
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
def bench(
    model: Any,
    pipelines: Sequence[Any],
    *,
    batch: int = 1,
    images: int = 1,
    image_size: ImageSize | None = None,
    frames: int = 1,
    text_tokens: int = 32,
    new_tokens: int = 16,
    repeats: int = 7,
    warmup: int = 2,
    seed: int = 0,
    oracles: bool = True,
) -> Bench:
    """Measures dense, every pipeline and every oracle once per round, in an order that rotates from round to round.

    Args:
        model: a stock model that is not wrapped; it is left as it was.
        pipelines: anything that `vtoken.wrap` takes.
        images, text_tokens: per prompt, of `batch` prompts.
        image_size: pixels, one number or (height, width); None is the tower's own size, 448 x 448 for Qwen. Families that resize
            every picture ignore it.
        frames: per image; more than one is a video.
        new_tokens: generated per prompt; end-of-sequence is disabled.
        repeats: rounds that count, after `warmup` rounds that do not.
        seed: of texts and pictures.
        oracles: whether they are measured.

    Raises:
        ConfigError: a count out of range, a pipeline that does not read, or an image size that the family's processor refuses.
        UnsupportedError: a family without random prompts, a wrapped model, or a stage the model cannot serve.
    """
    counts = {
        "batch": batch,
        "images": images,
        "frames": frames,
        "text_tokens": text_tokens,
        "new_tokens": new_tokens,
        "repeats": repeats,
    }
    for name, count in counts.items():
        if count < 1:
            raise ConfigError(f"{name} must be at least 1, not {count}")
    if warmup < 0:
        raise ConfigError(f"warmup must be at least 0, not {warmup}")
    parsed = [load(pipeline) for pipeline in pipelines]
    adapter = registry.adapter(model.config.model_type)(model)
    prompt = random_prompt(
        adapter,
        batch=batch,
        images=images,
        frames=frames,
        image_size=image_size,
        text_tokens=text_tokens,
        seed=seed,
    )
    runner = Runner(adapter, prompt)
    handle = Handle()
    # Whatever the checkpoint says about sampling and stopping must not decide what is measured.
    handle.set(model, "generation_config", GenerationConfig(do_sample=False, max_new_tokens=new_tokens))
    try:
        subjects = [runner.prepare(pipeline) for pipeline in (None, *parsed)]
        if not oracles:
            subjects = [replace(subject, oracle=None, no_oracle=None) for subject in subjects]
        for turn in range(-warmup, repeats):
            shift = turn % len(subjects)
            for subject in subjects[shift:] + subjects[:shift]:
                runner.round(subject, oracle_first=turn % 2 == 1, count=turn >= 0)
    finally:
        handle.release()
    dense = subjects[0]
    total = [sample.end_to_end for sample in dense.samples]
    half = repeats // 2
    drift = spread(total[-half:]).median / spread(total[:half]).median if half else None
    conditions = {**machine(model), **counts, "warmup": warmup, "seed": seed, "prompt": runner.shape}
    if image_size is not None:
        conditions["image_size"] = image_size
    return Bench(tuple(row(subject, dense) for subject in subjects), drift, conditions)


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles, linear between values."""
    found = torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64))
    return Spread(*found.tolist())


def row(subject: Subject, dense: Subject) -> Row:
    """The statistics of one subject; only its oracle's when it has one."""
    name = subject.pipeline.name if subject.pipeline else "dense"
    peaks = [sample.peak_bytes for sample in subject.samples if sample.peak_bytes is not None]
    base = Row(
        name,
        visual_tokens=subject.layers[-1],
        visual_entry=subject.layers[0],
        visual_average=sum(subject.layers) / len(subject.layers),
        kv_bytes=subject.kv_bytes,
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


def parts(samples: Sequence[Sample]) -> dict[str, Spread | None]:
    """Part -> spread, None for a part that the samples lack."""
    found = {part: [getattr(sample, part) for sample in samples] for part in PARTS}
    return {part: None if None in values else spread(values) for part, values in found.items()}


def ratios(samples: Sequence[Sample], others: Sequence[Sample]) -> dict[str, Spread | None]:
    """Part -> spread of samples[i] / others[i], for the parts that all variants have."""
    found: dict[str, Spread | None] = {}
    for part in COMPARED:
        pairs = [(getattr(a, part), getattr(b, part)) for a, b in zip(samples, others, strict=True)]
        found[part] = None if None in pairs[0] else spread([a / b for a, b in pairs])
    return found


def break_even(overhead: float, gain: float, dropped: int) -> int | None:
    """Tokens to drop before milliseconds of overhead are won back, where dropping `dropped` gains `gain` milliseconds.

    None where nothing was dropped or nothing gained; at least 1.
    """
    return max(1, math.ceil(overhead * dropped / gain)) if dropped > 0 and gain > 0 else None


def machine(model: Any) -> dict[str, Any]:
    """Hardware, versions and what the model computes with."""
    cuda = model.device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(model.device) if cuda else processor_name(),
        "threads": f"{torch.get_num_threads()} of {os.cpu_count()} CPUs",
        "versions": f"vtoken {vtoken.__version__}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"Python {platform.python_version()}",
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": model.config._attn_implementation,
    }
