"""LLaVA: a CLIP or SigLIP tower over one crop of 4 x 4 patches, each a visual token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from family import Draw, Family, Picture
from tiny_models import CLIP, IMG, SIZE, TEXT, TOKENS, TOWERS, finish
from torch import Tensor
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration


class Tiny(Family):
    classes = "Llava"
    image = other = odd = (SIZE, SIZE)
    pictures = ((56, 56, 1),)
    shipped_picture = 16
    checkpoints = {
        "llava-hf/llava-1.5-7b-hf": 7063,
        "llava-hf/llava-1.5-13b-hf": 13351,
        "llava-hf/bakLlava-v1-hf": 7567,
        "xtuner/llava-llama-3-8b-v1_1-transformers": 8355,
        "mistral-community/pixtral-12b": 12683,
    }

    def make(
        self,
        attn: str = "sdpa",
        seed: int = 0,
        tower: Literal["clip", "siglip", "pixtral"] = "clip",
        text: str = "llama",
        **text_overrides: Any,
    ) -> LlavaForConditionalGeneration:
        """`text` is the model_type of the decoder (llama, qwen2, mistral, ...)."""
        config = LlavaConfig(
            text_config={"model_type": text, **TEXT, **text_overrides},
            image_token_index=IMG,
            image_seq_length=TOKENS,
            dtype="float32",
            **TOWERS[tower],
        )
        return finish(LlavaForConditionalGeneration, config, attn, seed, [IMG])

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        images = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
        return kind(images, tokenizer, **CLIP, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return "img"

    def sized(self, kind: str, given: tuple[int, ...]) -> tuple[int, ...] | None:
        return None if given else super().sized(kind, given)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        return {"pixel_values": draw(len(pictures), 3, SIZE, SIZE)} if pictures else {}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        return [Picture("image", self.image)] * len(batch.get("pixel_values", ())), []
