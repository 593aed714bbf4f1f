"""SmolVLM: as Idefics3; a frame of a video counts as a picture."""

from vtoken.evals.cost.geometry._split import cut_alike, geometry, inputs

__all__ = ["cut_alike", "geometry", "inputs"]
