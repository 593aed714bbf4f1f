"""Idefics3, and the first SmolVLM, whose checkpoints are of this type."""

from __future__ import annotations

from vtoken.adapters._split import Split


class Idefics3(Split):
    """`Idefics3ForConditionalGeneration`."""

    model_type = "idefics3"
