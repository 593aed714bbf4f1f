"""VipLlava: LLaVA-1.5 with features of several tower layers side by side."""

from vtoken.evals.cost.geometry.llava import geometry, inputs

__all__ = ["geometry", "inputs"]
