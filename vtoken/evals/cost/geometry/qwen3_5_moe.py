"""Qwen3.5 with a mixture of experts: shapes as in Qwen3.5, and a token meets the experts chosen for it."""

from vtoken.evals.cost.geometry.qwen3_5 import geometry, inputs

__all__ = ["geometry", "inputs"]
