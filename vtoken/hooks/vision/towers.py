"""Which hooks a vision tower takes."""

from __future__ import annotations

from typing import Any

from vtoken.hooks.vision.grids_tower import GridsTower
from vtoken.hooks.vision.padded_tower import PaddedTower
from vtoken.hooks.vision.rows_tower import RowsTower
from vtoken.hooks.vision.sized_tower import SizedTower
from vtoken.hooks.vision.tower import Tower
from vtoken.hooks.vision.unit_tower import UnitTower
from vtoken.hooks.vision.varlen_tower import VarlenTower


def tower_of(encoder: Any) -> type[Tower]:
    """The class for an adapter's `Encoder`."""
    if encoder.packed:
        return RowsTower if encoder.by_rows else GridsTower if encoder.by_grids else VarlenTower
    if encoder.sized:
        return SizedTower
    return PaddedTower if encoder.unit == 1 else UnitTower
