"""GLM-4.6V: the parts of GLM-4.1V."""

from __future__ import annotations

from typing import Any

from families._glm import Glm


class Tiny(Glm):
    classes = "Glm46V"
    rotates_neighbours = True
    checkpoints = {"zai-org/GLM-4.6V-Flash": 10293}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        fields = super().fields(text)
        fields["text_config"]["model_type"], fields["vision_config"]["model_type"] = "glm4v_text", "glm4v_vision"
        return fields
