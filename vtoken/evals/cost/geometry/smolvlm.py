"""SmolVLM: as Idefics3; a frame of a video counts as a picture."""

from vtoken.evals.cost.geometry._split import geometry, inputs, size_of

__all__ = ["geometry", "inputs", "size_of"]
