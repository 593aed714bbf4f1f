"""Qwen3.5 whose decoder layers are mixtures of experts."""

from __future__ import annotations

from typing import Any

from families.qwen3_5 import Tiny as Dense


class Tiny(Dense):
    classes = "Qwen3_5Moe"
    # Without vtoken too, a stock model's decode steps are up to 8e-5 (drawn otherwise: 3e-4) from its own recomputation
    # in chunks; pruned prompts reach 3.6e-4 in one case of all.
    float32_error = 5e-4
    steady = {"num_experts_per_tok": 8}
    checkpoints = {"Qwen/Qwen3.5-35B-A3B": 35107}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        experts = {
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 16,
        }
        return super().fields({**experts, **text})
