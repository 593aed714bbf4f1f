"""Qwen3.5: the tower and the timestamps of Qwen3-VL; every other decoder layer keeps a state instead of attending."""

from __future__ import annotations

from typing import Any

from families._qwen import MROPE, Qwen
from families.qwen3_vl import Tiny as Qwen3VL


class Tiny(Qwen3VL):
    classes, processes = "Qwen3_5", "Qwen3VL"
    leading = False
    deepstack = 0
    states = (0, 2)
    checkpoints = {"Qwen/Qwen3.5-0.8B": 853, "Qwen/Qwen3.5-9B": 9410, "Qwen/Qwen3.5-27B": 27357}

    def tower(self) -> dict[str, Any]:
        return {"out_hidden_size": 32, "intermediate_size": 64, "num_position_embeddings": 64}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        rope = {**MROPE, "mrope_section": [1, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.75}
        depth = text.get("num_hidden_layers", 4)
        kinds = ["linear_attention" if k % 4 in self.states else "full_attention" for k in range(depth)]
        linear = {
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 4,
        }
        return Qwen.fields(self, {"head_dim": 8, "rope_parameters": rope, "layer_types": kinds, **linear, **text})
