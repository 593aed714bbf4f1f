"""What a pipeline costs, as a share of dense: counted FLOPs, or measured time to first token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from vtoken.config import Pipeline
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.speed.latency import bench
from vtoken.evals.tune.samples import Sample

Objective = Literal["flops", "ttft"]
ROUNDS = 5


@dataclass(frozen=True)
class Shape:
    """Of the prompt whose cost is taken: as `account` and `bench` take it."""

    images: int
    frames: int
    image_size: tuple[int, int] | None
    text_tokens: int

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def shape(generator: TextGenerator, sample: Sample) -> Shape:
    """Of a sample; its pictures are taken for equally large."""
    prompt = sample.prompt
    pictures = [*prompt.images, *(clip.frames[0] for clip in prompt.clips)]
    size = (pictures[0].height, pictures[0].width) if pictures else None
    frames = len(prompt.clips[0].frames) if prompt.clips else 1
    cost = generator.generate([prompt], {**sample.options, "max_new_tokens": 1})[0].cost
    text = max(1, cost.prompt_tokens - cost.visual_tokens)
    return Shape(max(1, len(pictures)), frames, size, text)


def share(generator: TextGenerator, pipeline: Pipeline, objective: Objective, like: Shape) -> float:
    """Cost of one prefill over dense's: all FLOPs, vision included, or the median of interleaved rounds.

    Raises:
        UnsupportedError: a stage that cannot be counted or measured.
    """
    options = {**like.to_dict(), "new_tokens": 1}
    if objective == "flops":
        config = generator.model.config
        return account(config, pipeline, **options).total / account(config, **options).total
    found = bench(generator.model, [pipeline], repeats=ROUNDS, warmup=1, **options).rows[1].to_dense
    assert found is not None and found["ttft"] is not None  # every pipeline has both
    return found["ttft"].median
