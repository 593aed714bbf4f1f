"""Idefics3: 3 x 3 patches to a token, and a picture of two crops and the whole."""

from __future__ import annotations

from transformers import Idefics3ImageProcessorPil

from families._split import Split


class Tiny(Split):
    classes = "Idefics3"
    scale, across, unit = 3, 3, 9
    offloads = False
    image, other, odd = (1, 2), (0, 0), (2, 3)
    images = Idefics3ImageProcessorPil
    shipped_picture = 9 * 17
    checkpoints = {
        "HuggingFaceM4/Idefics3-8B-Llama3": 8462,
        "HuggingFaceTB/SmolVLM-256M-Instruct": 256,
        "HuggingFaceTB/SmolVLM-500M-Instruct": 507,
        "HuggingFaceTB/SmolVLM-Instruct": 2246,
    }
