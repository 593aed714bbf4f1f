"""From how many visual tokens on a pipeline is faster than dense here: measured length by length, in interleaved
runs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import takewhile
from typing import Any

import torch

from vtoken.config import Pipeline
from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry import geometry
from vtoken.evals.shared.bars import progress
from vtoken.evals.shared.options import ImageSize
from vtoken.evals.speed.latency import Row, bench
from vtoken.evals.statistics import Spread
from vtoken.stages import size_of

SIDES = (112, 168, 224, 336, 448, 672, 896)  # pixels of one picture, where the family lets them decide
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16)  # pictures of a prompt
APART = 1.25  # ratio of two lengths that are both worth measuring


@dataclass(frozen=True)
class Length:
    """A prompt of `images` pictures of `image_size` (None: the family's own), which have so many visual tokens."""

    visual_tokens: int
    images: int
    image_size: ImageSize | None


@dataclass(frozen=True)
class Step:
    """A pipeline over dense at one length.

    Attributes:
        visual_tokens: of a prompt, before anything is dropped.
        ttft, end_to_end: per-round ratios pipeline / dense.
        aside: why no stage did anything, or None.
    """

    visual_tokens: int
    ttft: Spread
    end_to_end: Spread
    aside: str | None = None

    @property
    def faster(self) -> bool:
        """End to end, in three quarters of the rounds; a pipeline that did nothing is not, whatever the clock says."""
        return self.aside is None and self.end_to_end.high < 1


@dataclass(frozen=True)
class Measured:
    """What was measured.

    Attributes:
        steps: of every pipeline, shortest prompt first.
        stopped: why longer prompts were not tried, or "".
        conditions: as in Bench, without what differs from prompt to prompt.
    """

    steps: dict[str, tuple[Step, ...]]
    stopped: str
    conditions: dict[str, Any]

    def least(self, name: str) -> int | None:
        """The shortest length from which on the pipeline was faster at every one measured; None: not even at the
        longest."""
        faster = [step.visual_tokens for step in takewhile(lambda step: step.faster, reversed(self.steps[name]))]
        return faster[-1] if faster else None

    def to_dict(self) -> dict[str, Any]:
        rows = [
            {"pipeline": name, "min_visual_tokens": self.least(name), "steps": [asdict(step) for step in steps]}
            for name, steps in self.steps.items()
        ]
        return {"break_even": rows, "stopped": self.stopped, "conditions": self.conditions}


def lengths(config: Any, up_to: int, image_size: ImageSize | None = None, frames: int = 1) -> list[Length]:
    """Prompts of up to so many visual tokens, shortest first: pictures of several sizes, then several pictures.

    Args:
        image_size: the only size, where one is given.
    """

    def length(images: int, size: ImageSize | None) -> Length:
        return Length(images * size_of(geometry(config, size, images, frames).parts), images, size)

    found = [length(count, image_size) for count in COUNTS]
    for side in SIDES if image_size is None else ():
        with suppress(ConfigError):
            found.append(length(1, side))
    apart: list[Length] = []
    for each in sorted(found, key=lambda each: (each.visual_tokens, each.images)):
        if each.visual_tokens <= up_to and (not apart or each.visual_tokens >= APART * apart[-1].visual_tokens):
            apart.append(each)
    if not apart:
        shortest = min(each.visual_tokens for each in found if each.images == 1)
        raise ConfigError(f"one picture has {shortest} visual tokens, more than the {up_to} to be tried")
    return apart


def measure(model: Any, pipelines: Sequence[Pipeline], tried: Sequence[Length], **options: Any) -> Measured:
    """Dense and all pipelines interleaved, one length after the other.

    Args:
        tried: from `lengths`. Where the memory of a GPU does not suffice, the rest is left out.
        options: of `bench`, but for images and image_size.
    """
    steps: dict[str, list[Step]] = {pipeline.name: [] for pipeline in pipelines}
    if len(steps) < len(pipelines):
        raise ConfigError("two pipelines have one name; rename one file")
    stopped, conditions = "", {}
    with progress() as tell:
        for done, length in enumerate(tried):
            tell(f"{length.visual_tokens} visual tokens", done / len(tried))
            shape = {"images": length.images, "image_size": length.image_size}
            try:
                found = bench(model, pipelines, oracles=False, **shape, **options)
            except torch.OutOfMemoryError:
                stopped = f"prompts of {length.visual_tokens} visual tokens do not fit into the device's memory"
                break
            conditions = found.conditions
            for row, pipeline in zip(found.rows[1:], pipelines, strict=True):
                steps[pipeline.name].append(_step(row, pipeline, length))
    alike = {name: conditions[name] for name in conditions if name not in ("images", "image_size", "prompt")}
    return Measured({name: tuple(each) for name, each in steps.items()}, stopped, alike)


def _step(row: Row, pipeline: Pipeline, length: Length) -> Step:
    ratios = row.to_dense
    assert ratios is not None and ratios["ttft"] is not None and ratios["end_to_end"] is not None  # of every pipeline
    idle = len(row.stood_aside) == len({stage.name for stage in pipeline.stages})
    aside = ("; ".join(dict.fromkeys(row.stood_aside.values())) or "it has no stages") if idle else None
    return Step(length.visual_tokens, ratios["ttft"], ratios["end_to_end"], aside)
