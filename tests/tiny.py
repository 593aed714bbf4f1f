"""Tiny random-weight VLMs and batches for them, without downloads or processors: under a second each on one core.

56 px pictures in 14 px patches give 16 visual tokens (a 4 x 4 raster) per image. Tower and decoder have 4 layers of
width 32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import LlavaConfig, LlavaForConditionalGeneration, PreTrainedModel

IMG = 190  # id of the image placeholder
VOCAB = 200
PAD = 0
TOKENS = 16  # visual tokens per image
GRID = (1, 4, 4)
SIZE, PATCH = 56, 14

TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
}
# CLIP has a CLS token that LLaVA drops, SigLIP has none. Features come from the last layer but one, and from the last.
TOWERS: dict[str, dict[str, Any]] = {
    "clip": {
        "vision_config": {"model_type": "clip_vision_model", **VISION},
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    },
    "siglip": {
        "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **VISION},
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
    },
}


def llava(
    attn: str = "sdpa",
    seed: int = 0,
    tower: Literal["clip", "siglip"] = "clip",
    text: str = "llama",
    **text_overrides: Any,
) -> LlavaForConditionalGeneration:
    """A LLaVA in evaluation mode, float32 on the CPU: the same weights for the same arguments, whatever ran before.

    Args:
        attn: attention implementation of tower and decoder.
        seed: of the weights; torch's global generator is left as it was.
        tower: vision tower, see `TOWERS`.
        text: model_type of the decoder (llama, qwen2, mistral, ...).
        text_overrides: fields of the decoder's config, over `TEXT`.
    """
    config = LlavaConfig(
        text_config={"model_type": text, **TEXT, **text_overrides},
        image_token_index=IMG,
        image_seq_length=TOKENS,
        dtype="float32",
        **TOWERS[tower],
    )
    config._attn_implementation = attn
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlavaForConditionalGeneration(config)
        _boost(model)
    model.train(False)
    with torch.no_grad():
        model.lm_head.weight[IMG] = 0  # never sample the placeholder
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model


def _boost(model: PreTrainedModel) -> None:
    """Stock initialisation gives about the same logits for every input: make matrices large enough to matter."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.0 if "embed_tokens" in name else 0.3)


def build(model: PreTrainedModel, rows: Sequence[Sequence[int | str]], seed: int = 0) -> dict[str, Tensor]:
    """A left-padded batch for `model(**batch)` and `model.generate(**batch)`.

    Args:
        model: from this file; gives the image size and the device.
        rows: one list per batch row: an int is that many random text tokens, "img" is one random image.
            `[[3, "img", 5], [2]]` is a row of 24 tokens and a text-only row of 2, padded to 24.
        seed: of text and pictures.

    Returns:
        `input_ids` and `attention_mask` [B, L] int64, and `pixel_values` [images, 3, 56, 56] when there is an image.
    """
    generator = torch.Generator().manual_seed(seed)
    ids: list[list[int]] = []
    images = 0
    for row in rows:
        ids.append([])
        for item in row:
            if isinstance(item, int):
                ids[-1] += torch.randint(10, 180, (item,), generator=generator).tolist()
            elif item == "img":
                ids[-1] += [IMG] * TOKENS
                images += 1
            else:
                raise ValueError(f'{item!r} in rows: write a number of text tokens or "img"')
    length = max(map(len, ids))
    batch = {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in ids]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids]),
    }
    if images:
        batch["pixel_values"] = torch.randn(images, 3, SIZE, SIZE, generator=generator)
    return {name: tensor.to(model.device) for name, tensor in batch.items()}
