"""GLM-4.5V: decoder layers that are mixtures of experts with a shared one, but for the first."""

from __future__ import annotations

from typing import Any

from families._glm import Glm


class Tiny(Glm):
    classes, processes = "Glm4vMoe", "Glm4v"
    gaps_for_flash = True
    steady = {"num_experts_per_tok": 12}
    checkpoints = {"zai-org/GLM-4.5V": 107711}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        experts = {"n_routed_experts": 12, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
        return super().fields({**experts, **text})
