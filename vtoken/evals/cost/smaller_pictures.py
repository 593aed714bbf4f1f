"""What stages of site pixels leave to the vision tower."""

from __future__ import annotations

from collections.abc import Sequence

from vtoken.errors import UnsupportedError
from vtoken.evals.cost.geometry.shapes import Geometry
from vtoken.hooks.vision.pixel_stages import parted
from vtoken.stages import Stage, size_of


def before_tower(shape: Geometry, stages: Sequence[Stage]) -> tuple[Geometry, list[Stage]]:
    """The shapes of the resized pictures, and the stages that then choose among their tokens.

    Raises:
        UnsupportedError: the tower does not take pictures of any size as one sequence.
    """
    if stages and shape.tower.resized is None:
        raise UnsupportedError(
            f"stage {stages[0].name} acts on pixels before a tower that takes pictures of any size, and this one does "
            "not; pool averages neighbouring tokens instead"
        )
    resizers, others = parted(stages)
    for stage in resizers:
        wanted = stage.resized((size_of(shape.parts),), (shape.parts,))
        assert wanted is not None
        shape = shape.resized(wanted[0][0])
    return shape, others
