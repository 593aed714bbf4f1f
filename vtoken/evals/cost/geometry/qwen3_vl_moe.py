"""Qwen3-VL with a mixture of experts: shapes as in Qwen3-VL, and a token meets the experts chosen for it."""

from vtoken.evals.cost.geometry.qwen3_vl import geometry, inputs

__all__ = ["geometry", "inputs"]
