"""GLM-4.5V: GLM-4.1V with a mixture of experts in its decoder layers."""

from __future__ import annotations

from vtoken.adapters._glm import Glm


class Glm4vMoe(Glm):
    """`Glm4vMoeForConditionalGeneration`."""

    model_type = "glm4v_moe"
