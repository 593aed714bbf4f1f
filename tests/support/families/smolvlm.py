"""SmolVLM: 2 x 2 patches to a token, and a picture of one crop unless it is said to be cut."""

from __future__ import annotations

from transformers import SmolVLMImageProcessorPil

from families._split import Split


class Tiny(Split):
    classes = "SmolVLM"
    scale, across, unit = 2, 4, 4
    image, other, odd = (0, 0), (1, 2), (2, 2)
    images, halves = SmolVLMImageProcessorPil, (None,)
    shipped_picture = 16 * 17
    checkpoints = {
        "HuggingFaceTB/SmolVLM2-256M-Video-Instruct": 256,
        "HuggingFaceTB/SmolVLM2-500M-Video-Instruct": 507,
        "HuggingFaceTB/SmolVLM2-2.2B-Instruct": 2247,
    }
