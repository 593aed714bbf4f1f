"""Tiny random Qwen-VLs on disk as vLLM takes them: heads of 32 channels, a processor with its video half."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import transformers
from tiny_models import PATCH, TEXT, finish
from tiny_processors import _template, tokenizer

WIDTH = 128
SHAPE = {"hidden_size": WIDTH, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
LIMITS = {"shortest_edge": 56 * 56, "longest_edge": 112 * 112}


def save(family: str, folder: Path) -> Path:
    """Model and processor of a family without windows in a folder."""
    one = tiny.family(family)
    axes = {"mrope_section": [6, 5, 5], "mrope_interleaved": True} if one.deepstack else {"mrope_section": [4, 6, 6]}
    rope = {"rope_type": "default", "rope_theta": 10000.0, **axes}
    fields = one.fields({**TEXT, **SHAPE, "head_dim": 32, "rope_parameters": rope})
    vision: dict[str, Any] = fields["vision_config"]
    vision["hidden_size" if "embed_dim" in vision else "out_hidden_size"] = WIDTH
    config = getattr(transformers, f"{one.classes}Config")(**fields, tie_word_embeddings=False, dtype="float32")
    model = finish(getattr(transformers, f"{one.classes}ForConditionalGeneration"), config, "sdpa", 0, range(190, 194))
    model.save_pretrained(folder)
    half = [0.5, 0.5, 0.5]  # of both: vLLM normalises on the device, by one of the two
    sizes = {"patch_size": PATCH, "merge_size": 2, "temporal_patch_size": 2, "image_mean": half, "image_std": half}
    processor = getattr(transformers, f"{one.classes}Processor")(
        transformers.Qwen2VLImageProcessor(**sizes, size=LIMITS),
        tokenizer(*one.words),
        getattr(transformers, f"{one.classes}VideoProcessor")(
            **sizes, size={"shortest_edge": 56 * 56, "longest_edge": 8 * 112 * 112}
        ),
        chat_template=_template(*one.words, *one.around),
    )
    processor.save_pretrained(folder)
    return folder
