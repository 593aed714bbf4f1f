"""Qwen3-VL whose decoder layers are mixtures of experts, but for one."""

from __future__ import annotations

from typing import Any

from families.qwen3_vl import Tiny as Dense


class Tiny(Dense):
    classes, processes = "Qwen3VLMoe", "Qwen3VL"
    leading = False
    steady = {"num_experts_per_tok": 8}
    checkpoints = {"Qwen/Qwen3-VL-30B-A3B-Instruct": 31071, "Qwen/Qwen3-VL-235B-A22B-Instruct": 235670}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}
        return super().fields({**experts, **text})
