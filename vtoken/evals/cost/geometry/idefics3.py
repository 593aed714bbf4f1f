"""Idefics3: crops and the whole, parted by text."""

from vtoken.evals.cost.geometry._split import geometry, inputs, size_of

__all__ = ["geometry", "inputs", "size_of"]
