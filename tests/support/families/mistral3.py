"""Mistral Small 3: Pixtral over pictures of their own size, 2 x 2 patches to a token, a token between rows."""

from __future__ import annotations

from typing import Any

from families._pixtral import Pixtral


class Tiny(Pixtral):
    classes = "Mistral3"
    unit = 4
    image, other, odd = (112, 84), (56, 112), (84, 140)
    pictures = ((56, 56, 1), (84, 140, 1), (196, 56, 1), (28, 300, 1))
    unpadded = (112, 140)
    shipped_picture = 9
    checkpoints = {"mistralai/Mistral-Small-3.1-24B-Instruct-2503": 24011}

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        return {**super().fields(text), "spatial_merge_size": 2}
