"""InternVL: InternViT with CLS over crops of 8 x 8 patches, 2 x 2 of them to a token; the prompt tells which crops are
of one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from family import Draw, Family, Picture, Spec
from tiny_models import IMG, SIZE, TOKENS, VISION_END, VISION_START
from torch import Tensor
from transformers import GotOcr2ImageProcessorPil, PreTrainedModel

from vtoken.evals.cost.geometry.internvl import crops

VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": [SIZE, SIZE],
    "patch_size": [7, 7],
    "use_qk_norm": True,
    "layer_scale_init_value": 0.5,
}

# What the processor asks its tokenizer for.
WORDS = ("context_image_token", "start_image_token", "end_image_token", "video_token")
AROUND = ("<|vision_start|>", "<|vision_end|>")


class Tiny(Family):
    """A spec is (rows, columns) of crops; a thumbnail follows where they are several."""

    classes = "InternVL"
    image, other, odd = (1, 1), (1, 2), (1, 3)
    pictures = ((56, 56, 1), (56, 112, 1), (300, 40, 1))
    unit = 4
    shipped_picture = 10 * 16
    # The prompt tells which crops are a picture's.
    waits = (("asked", "run.py:runs"),)
    checkpoints = {
        "OpenGVLab/InternVL3-1B-hf": 938,
        "OpenGVLab/InternVL3-2B-hf": 2089,
        "OpenGVLab/InternVL3-8B-hf": 7944,
        "OpenGVLab/InternVL3-14B-hf": 15117,
    }

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        ids = {"image_token_id": IMG, "image_seq_length": TOKENS}
        return {"text_config": {"model_type": "qwen2", **text}, "vision_config": VISION, **ids}

    def make(self, attn: str = "sdpa", seed: int = 0, **text: Any) -> PreTrainedModel:
        model = super().make(attn, seed, **text)
        with torch.no_grad():
            for layer in model.model.vision_tower.encoder.layer:
                layer.attention.q_norm.weight.fill_(4.0)  # or every patch sees all others alike
        return model

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        words = dict(zip(WORDS, (self.words[0], *AROUND, self.words[1]), strict=True))
        named = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer,
            extra_special_tokens=words,
            **{name: getattr(tokenizer, name) for name in ("pad_token", "bos_token", "unk_token")},
        )
        images = GotOcr2ImageProcessorPil(size={"height": SIZE, "width": SIZE})
        return kind(images, named, image_seq_length=TOKENS, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return ("img", spec(crops((height, width), SIZE)))

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        return [VISION_START, *super().placeholders(picture, words), VISION_END]

    def tokens(self, picture: Picture) -> int:
        return self.rows(picture) * TOKENS

    def features(self, picture: Picture, **more: Tensor) -> Tensor:
        pixels = self.inputs([picture], torch.zeros)["pixel_values"]
        return self.stock.model.get_image_features(pixels, **more, return_dict=True).pooler_output.flatten(0, 1)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        return {"pixel_values": draw(sum(map(self.rows, pictures)), 3, SIZE, SIZE)} if pictures else {}

    def rows(self, picture: Picture) -> int:
        many = prod(picture.spec)
        return many + (many > 1)

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        here = torch.nn.functional.pad(batch["input_ids"] == IMG, (1, 1)).int().diff(dim=1)
        lengths = (here < 0).nonzero()[:, 1] - (here > 0).nonzero()[:, 1]
        return [Picture("image", spec(n // TOKENS)) for n in lengths.tolist()], []


def spec(crops: int) -> Spec:
    """One that so many crops, the thumbnail among them, can be."""
    return (1, max(1, crops - 1))
