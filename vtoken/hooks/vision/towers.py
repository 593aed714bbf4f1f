"""Which hooks a vision tower takes."""

from __future__ import annotations

from vtoken.adapters.base import Encoder
from vtoken.hooks.vision.padded_tower import PaddedTower
from vtoken.hooks.vision.tower import Tower
from vtoken.hooks.vision.unit_tower import UnitTower
from vtoken.hooks.vision.varlen_tower import VarlenTower


def tower_of(encoder: Encoder) -> type[Tower]:
    if encoder.packed:
        return VarlenTower
    return PaddedTower if encoder.unit == 1 else UnitTower
