"""Processors without their video half."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_processors
import transformers

from vtoken.evals.processors import pictures_only


@pytest.mark.parametrize("name", ["LlavaNextVideoProcessor", "LlavaOnevisionProcessor", "Qwen2VLProcessor"])
def test_the_video_half_is_left_out_wherever_it_stands(name: str, tmp_path: Path) -> None:
    """The first class asks for it before everything else."""
    images, tokenizer = transformers.CLIPImageProcessorPil(), tiny_processors.tokenizer("<image>", "<video>")
    kind = pictures_only(getattr(transformers, name))
    processor = kind(image_processor=images, tokenizer=tokenizer)
    assert (processor.image_processor, processor.tokenizer) == (images, tokenizer)
    assert not hasattr(processor, "video_processor")
    processor.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, backend="pil")
    assert type(again).__name__ == name and type(again.image_processor) is type(images)
