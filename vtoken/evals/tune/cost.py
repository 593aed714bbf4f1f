"""What a pipeline costs, as a share of dense: counted FLOPs, or measured time to first token."""

from __future__ import annotations

from typing import Literal

from vtoken.config import Pipeline
from vtoken.evals.cost.flops import account, picture_size
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import encode, text_tokens
from vtoken.evals.shared.options import Workload
from vtoken.evals.speed.latency import bench
from vtoken.evals.tune.samples import Sample

Objective = Literal["flops", "ttft"]
ROUNDS = 5


def shape(generator: TextGenerator, sample: Sample) -> Workload:
    """Prefill of a sample; its pictures are taken for as large as the first."""
    prompt = sample.prompt
    inputs = encode(generator.processor, [prompt], generator.model)
    grids = {"image_grid_thw": inputs["video_grid_thw"]} if "video_grid_thw" in inputs else inputs
    size = picture_size(generator.model.config, grids)
    if size is None and prompt.pictures:
        size = prompt.pictures[0].height, prompt.pictures[0].width
    return Workload(
        images=max(1, len(prompt.images) + len(prompt.clips)),
        frames=len(prompt.clips[0].frames) if prompt.clips else 1,
        image_size=size,
        text_tokens=max(1, text_tokens(generator.adapter, inputs)),
        new_tokens=1,
    )


def share(generator: TextGenerator, pipeline: Pipeline, objective: Objective, like: Workload) -> float:
    """Cost of one prefill over dense's: all FLOPs, vision included, or the median of interleaved rounds."""
    if objective == "flops":
        config = generator.model.config
        return account(config, pipeline, **vars(like)).total / account(config, **vars(like)).total
    found = bench(generator.model, [pipeline], repeats=ROUNDS, warmup=1, **vars(like)).rows[1].to_dense
    assert found is not None and found["ttft"] is not None  # every pipeline has both
    return found["ttft"].median
