"""What a pipeline costs, as a share of dense: counted FLOPs, or measured time to first token."""

from __future__ import annotations

from typing import Literal

from vtoken.config import Pipeline
from vtoken.evals.cost.flops import account
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import encode, workload
from vtoken.evals.shared.options import Workload
from vtoken.evals.speed.latency import bench
from vtoken.evals.tune.samples import Sample

Objective = Literal["flops", "ttft"]
ROUNDS = 5


def shape(generator: TextGenerator, sample: Sample) -> Workload:
    """Prefill of a sample."""
    inputs = encode(generator.processor, [sample.prompt], generator.model)
    return workload(generator.adapter, sample.prompt, inputs)


def share(generator: TextGenerator, pipeline: Pipeline, objective: Objective, like: Workload) -> float:
    """Cost of one prefill over dense's: all FLOPs, vision included, or the median of interleaved rounds."""
    if objective == "flops":
        config = generator.model.config
        return account(config, pipeline, **vars(like)).total / account(config, **vars(like)).total
    found = bench(generator.model, [pipeline], repeats=ROUNDS, warmup=1, **vars(like)).rows[1].to_dense
    assert found is not None and found["ttft"] is not None  # every pipeline has both
    return found["ttft"].median
