"""A tiny LLaVA-OneVision of random weights for vLLM, its processor, and prompts with pictures and videos of several
sizes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tiny
import tiny_processors
from PIL import Image
from tiny_models import IMG, PINPOINTS, SIZE, TEXT, TOKENS, VISION_END, finish
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
)
from vllm_engine import Prompt

# vLLM's attention on CPUs has no smaller heads.
DECODER = {**TEXT, "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
# The last one has 16 crops, and more than nine are scaled down.
GRIDS = [*PINPOINTS, [4 * SIZE, 4 * SIZE]]
# (height, width): whole crops; such that lose padding; scaled down; scaled down and without padding; thinner than a
# patch.
SIZES = ((112, 112), (56, 112), (100, 60), (300, 40), (230, 200), (224, 224), (180, 224), (3, 112))


def model(aspect: str = "anyres_max_9") -> Any:
    fields = tiny.family("llava_onevision").fields(DECODER)
    given = {**fields, "vision_aspect_ratio": aspect, "image_grid_pinpoints": GRIDS}
    config = LlavaOnevisionConfig(**given, tie_word_embeddings=False, dtype="float32")
    return finish(LlavaOnevisionForConditionalGeneration, config, "sdpa", 0, range(IMG, VISION_END + 1))


def processor() -> LlavaOnevisionProcessor:
    """Pictures are resized by torchvision, as vLLM has it done."""
    size = {"height": SIZE, "width": SIZE}
    return LlavaOnevisionProcessor(
        image_processor=LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=GRIDS),
        tokenizer=tiny_processors.tokenizer("<image>", "<video>"),
        video_processor=LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=TOKENS,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_9",
    )


def save(folder: Path, **options: Any) -> Path:
    model(**options).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def prompt(seed: int, sizes: Sequence[tuple[int, int]] = (), frames: Sequence[int] = ()) -> Prompt:
    """Words, and between them random pictures of these (height, width) and videos of so many frames."""
    random = np.random.default_rng(seed)

    def words(n: int) -> str:
        return " ".join(f"w{k}" for k in random.integers(10, 180, n))

    def pixels(*shape: int) -> Any:
        return random.integers(0, 256, (*shape, 3), dtype=np.uint8)

    pictures = [Image.fromarray(pixels(*size)) for size in sizes]
    videos = [pixels(n, SIZE, SIZE) for n in frames]
    media = ["<image>"] * len(pictures) + ["<video>"] * len(videos)
    text = " ".join([words(4), *(f"{each} {words(3)}" for each in media)])
    return Prompt(text, pictures, videos)
