"""GLM-4.1V: a dense decoder."""

from __future__ import annotations

from vtoken.adapters._glm import Glm


class Glm4v(Glm):
    """`Glm4vForConditionalGeneration`."""

    model_type = "glm4v"
