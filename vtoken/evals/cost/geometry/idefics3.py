"""Idefics3: crops and the whole, parted by text."""

from vtoken.evals.cost.geometry._split import cut_alike, geometry, inputs

__all__ = ["cut_alike", "geometry", "inputs"]
