"""GLM-4.6V: as GLM-4.1V."""

from vtoken.evals.cost.geometry.glm4v import geometry, inputs

__all__ = ["geometry", "inputs"]
