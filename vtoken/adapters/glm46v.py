"""GLM-4.6V: tower and decoder of GLM-4.1V under a model of its own."""

from __future__ import annotations

from vtoken.adapters._glm import Glm


class Glm46V(Glm):
    """`Glm46VForConditionalGeneration`."""

    model_type = "glm46v"
