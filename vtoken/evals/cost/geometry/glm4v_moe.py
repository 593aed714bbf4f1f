"""GLM-4.5V: as GLM-4.1V, and a token meets the experts chosen for it and the shared one."""

from vtoken.evals.cost.geometry.glm4v import geometry, inputs

__all__ = ["geometry", "inputs"]
