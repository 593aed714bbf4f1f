"""SmolVLM2: as Idefics3; the frames of a video are pictures of one crop each."""

from __future__ import annotations

from vtoken.adapters._split import Split


class SmolVLM(Split):
    """`SmolVLMForConditionalGeneration`."""

    model_type = "smolvlm"
