"""Similarity thresholds from `vtoken calibrate dtome`, for stages that merge all pairs above them."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from vtoken.compressors._files import Shape, existing, expect, opened
from vtoken.stages import NAMES_FILE

MEND = "make them with vtoken calibrate dtome"


class Thresholds(BaseModel):
    """Options that a file of thresholds can fill; after that, the stage holds the numbers themselves."""

    thresholds: str | tuple[float, ...] = Field(
        description="one per layer (dtome) or round (dtome_post); pairs above it merge; or the file of `vtoken "
        "calibrate dtome`",
        json_schema_extra=NAMES_FILE,
    )
    left: tuple[float, ...] | None = Field(
        default=None, description="share of tokens left after each, as calibrated, for the FLOPs account"
    )

    @model_validator(mode="before")
    @classmethod
    def _read(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        if isinstance(data.get("thresholds"), str):
            return {**data, **read(data["thresholds"], cls.__module__.rpartition(".")[2])}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in data.items()}

    def threshold(self, at: int) -> float:
        """The threshold of a layer or round."""
        value = self.thresholds[at]
        assert isinstance(value, float)
        return value

    def above(self, value: Tensor, lengths: Sequence[int], at: int) -> tuple[int, ...]:
        """Number of merges per sequence, at most half its tokens; fetched from the device once."""
        counts: list[int] = (value > self.threshold(at)).sum(1).tolist()
        return tuple(min(count, n // 2) for count, n in zip(counts, lengths, strict=True))

    def expected(self, lengths: Sequence[int], full: Sequence[int], at: int) -> tuple[int, ...]:
        """Expected tokens of each image; all of them if there was no calibration."""
        if self.left is None:
            return tuple(lengths)
        share = self.left[at]
        return tuple(min(n, max(1, ceil(f * share))) for n, f in zip(lengths, full, strict=True))


def read(path: str, method: str) -> dict[str, Any]:
    """The options of a file.

    Raises:
        ValueError: there is no such file, or it holds no thresholds for this method.
    """
    file = existing(Path(path), path, MEND)
    about, found = opened(file)
    if about.get("method") != method:
        of = f"the thresholds of {reprlib.repr(about['method'])}" if "method" in about else "no thresholds"
        raise ValueError(f"{path} holds {of}, not those of {method}; {MEND}")
    first = found.get("thresholds")
    shape: Shape = (max(1, len(first)),) if first is not None and first.ndim else ("layers or rounds",)
    expect(file, found, ((name, shape) for name in ("thresholds", "left") if name in found or name == "thresholds"))
    numbers = {name: tuple(found[name].tolist()) for name in found}
    if not all(0 < share <= 1 for share in numbers.get("left", ())):
        raise ValueError(
            f"{path}: tensor 'left' holds {min(numbers['left'])}, expected shares above 0, at most 1; {MEND}"
        )
    return numbers
