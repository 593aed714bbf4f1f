"""The `min_visual_tokens` of the presets, by a model of cost: nothing is measured here. `python benchmarks/break_even.py`

A decoder layer takes as long as its matrices are multiplied or, for few tokens, read; attention and the vision tower are left out, which
stages of site tokens and decoder leave alone or make only cheaper. What a pipeline costs is taken as 2 ms of host work where tokens are
first dropped (measured, benchmarks/RESULTS.md) and as much again at every further cut. Facts of the vision tower are worked out all the
same, so they do not count. A preset gets the least number of visual tokens from which on it is not slower than the dense model.
"""

from __future__ import annotations

from vtoken import config, registry
from vtoken.stages import Stage

DEPTH, PARAMETERS = 28, 233e6  # of Qwen2.5-VL-7B's decoder, per layer
FLOPS, BYTES = 600e12, 4.8e12  # a second: an H200 in bfloat16, dense matrices; its memory
OVERHEAD = 2e-3  # seconds of every cut
TEXT = 40  # tokens of the prompt that are none of the image's
# Above it the pictures that a preset was published for would be left dense. Such a preset has no threshold; by this model it costs time.
PUBLISHED = 1024
FRAMES, LARGEST, STEP = 4, 8192, 16
# Baselines are there to be compared with, and this exit has gates for one tiny model.
LEFT_ALONE = ("none", "random", "uniform", "dyvte")


def seconds(tokens: list[int]) -> float:
    """Of a decoder whose layers see so many visual tokens."""
    return sum(max(2 * PARAMETERS * (n + TEXT) / FLOPS, 2 * PARAMETERS / BYTES) for n in tokens)


def layers(stages: tuple[Stage, ...], side: int) -> tuple[list[int], int]:
    """Visual tokens per layer of a video of FRAMES frames of side x side tokens, as the stages plan, and how often they cut."""
    parts, counts, cuts, out = (((FRAMES, side, side),),), (FRAMES * side * side,), 0, []
    bound = [stage.bound(DEPTH) for stage in stages]
    for layer in (None, *range(DEPTH)):
        for stage in bound:
            if (stage.site == "tokens") == (layer is None) and (layer is None or layer in stage.layers(DEPTH)):
                after = stage.plan(counts, parts, (0,), layer)
                cuts, counts = cuts + (after != counts), tuple(after)
        if layer is not None:
            out.append(counts[0])
    return out, cuts


def least(stages: tuple[Stage, ...]) -> int | None:
    """The number from which on the pipeline pays, up to STEP; None if it never does, as far as its plans tell."""
    found = None
    for side in range(int((LARGEST / FRAMES) ** 0.5), 1, -1):
        n = FRAMES * side * side
        after, cuts = layers(stages, side)
        if seconds(after) + OVERHEAD * cuts >= seconds([n] * DEPTH):
            break
        found = n
    return None if found is None else -(-found // STEP) * STEP


def presets() -> dict[str, int | None]:
    """Of those that may meet pictures of any size: renumbered positions and fixed crops go with LLaVA's 576 tokens and more."""
    out = {}
    for name in registry.presets():
        pipeline = config.load(name)
        sites = {stage.site for stage in pipeline.stages}
        anywhere = pipeline.positions == "original" and pipeline.anyres == "model"
        if anywhere and sites <= {"tokens", "decoder"} and not name.startswith(LEFT_ALONE):
            out[name] = least(pipeline.stages)
    return out


if __name__ == "__main__":
    for name, n in presets().items():
        note = " (none in the preset)" if n is not None and n > PUBLISHED else ""
        print(f"{name:28} {'never, as far as its plan tells' if n is None else n}{note}")
