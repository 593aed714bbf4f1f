"""The two kinds of stages at site pixels."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.stages import Stage


def resizes(stage: Stage) -> bool:
    """Whether a stage of site pixels resizes pictures; else it chooses."""
    return type(stage).resized is not Stage.resized


def parted(stages: Sequence[Stage]) -> tuple[list[Stage], list[Stage]]:
    """Those of site pixels that resize pictures, and those that choose."""
    return [stage for stage in stages if resizes(stage)], [stage for stage in stages if not resizes(stage)]
