"""What the models here ask of the engine: modes that go with a pipeline, and how much enters the tower at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vllm.config import VllmConfig

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError


def check_engine(engine: VllmConfig, pipeline: Pipeline) -> None:
    """Refuses modes of the engine that bypass hooks or count tokens differently.

    Raises:
        UnsupportedError: names the option.
    """
    compilation, lora = engine.compilation_config, engine.lora_config
    why = ""
    if getattr(compilation, "compile_mm_encoder", False):
        why = "compile_mm_encoder compiles hooks in the vision tower away"
    elif getattr(compilation, "cudagraph_mm_encoder", False):
        why = "cudagraph_mm_encoder goes past the function that prunes"
    elif lora is not None and getattr(lora, "enable_tower_connector_lora", False):
        why = "LoRA on tower or projector gets the kept tokens, where it needs all"
    if why:
        raise UnsupportedError(f"pipeline {pipeline.name}: {why}; leave the option out")


def check_parallel(engine: VllmConfig) -> None:
    """Refuses modes of the engine in which kept tokens would lose their positions.

    Raises:
        UnsupportedError: names the option.
    """
    if engine.parallel_config.pipeline_parallel_size > 1:
        raise UnsupportedError(
            "--pipeline-parallel-size: only the first stage learns where kept tokens stand; use tensor parallelism"
        )
    if engine.speculative_config is not None:
        raise UnsupportedError("--speculative-config: a drafter does not learn where kept tokens stand; leave it out")


def groups(lengths: Sequence[int], most: int) -> Iterator[slice]:
    """Slices of neighbours with at most `most` tokens together, or of a single item that has more."""
    start = total = 0
    for k, length in enumerate(lengths):
        if k > start and total + length > most:
            yield slice(start, k)
            start, total = k, 0
        total += length
    yield slice(start, len(lengths))
