"""Qwen2.5-VL's processor where torchvision, which its video part needs, is not installed."""

from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, Qwen2VLImageProcessorPil


class Qwen2_5_VLProcessor(transformers.Qwen2_5_VLProcessor):
    """The stock processor without a video processor: pictures work, videos do not. What it saves the stock one reads where torchvision is."""

    @classmethod
    def get_attributes(cls) -> list[str]:
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def stock(cls, folder: Path) -> "Qwen2_5_VLProcessor":
        """Read what a Qwen2.5-VL processor saved."""
        config, _ = cls.get_processor_dict(folder)
        images = Qwen2VLImageProcessorPil.from_dict(config["image_processor"])
        return cls(images, AutoTokenizer.from_pretrained(folder), chat_template=config["chat_template"])

    def to_dict(self) -> dict[str, Any]:
        output: dict[str, Any] = super().to_dict()
        shared = {k: v for k, v in output["image_processor"].items() if k != "image_processor_type"}
        return {**output, "video_processor": {**shared, "video_processor_type": "Qwen2VLVideoProcessor"}}
