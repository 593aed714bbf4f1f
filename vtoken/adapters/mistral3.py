"""Mistral Small 3.1 and 3.2: a Pixtral tower, 2 x 2 patches joined to a token by the projector."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._pixtral import Pixtral


class Mistral3(Pixtral):
    """`Mistral3ForConditionalGeneration`."""

    model_type = "mistral3"

    def __init__(self, model: Any) -> None:
        super().__init__(model, merge=model.config.spatial_merge_size)
