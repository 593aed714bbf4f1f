"""Idefics3: crops and the whole, parted by text."""

from vtoken.evals.cost.geometry._split import geometry, inputs

__all__ = ["geometry", "inputs"]
