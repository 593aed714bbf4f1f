"""DeepSeek-VL 1.3B: every image is one crop of the tower's own size, read from its last layer."""

from vtoken.evals.cost.geometry.llava import geometry, inputs

__all__ = ["geometry", "inputs"]
