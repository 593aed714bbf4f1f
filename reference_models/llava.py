"""tiny-llava: 576 patches of 8 pixels, a CLIP tower with CLS, a two-layer projector, a Llama decoder."""

from typing import Any

import torch
from torch import nn
from transformers import CLIPImageProcessorPil, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from . import build
from .batches import Pictures
from .dialogue import VOCABULARY
from .family import LLAVA, Family, Heads, clip_states, presence_loss
from .oracle import Oracle
from .pictures import GRID, SIZE
from .recipe import Recipe


class TinyLlava(Family):
    name = "tiny-llava"
    recipe = Recipe()
    plan = ("a1", "b1", "b2", "b3", "b4", "b5", "c1", "c2", "d1", "b6", "c3", "d2", "d3", "d4", "d5")
    tokens = GRID * GRID

    def model(self) -> LlavaForConditionalGeneration:
        """Random weights; features are taken one layer before the last, as LLaVA-1.5 does."""
        config = LlavaConfig(
            vision_config=build.clip(SIZE),
            text_config=build.llama(),
            image_token_index=VOCABULARY["<image>"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_seq_length=self.tokens,
        )
        model = LlavaForConditionalGeneration(config)
        nn.init.normal_(model.model.language_model.embed_tokens.weight, std=0.5)
        # Rows that start nearly alike are pulled alike: two colours ended as one word.
        nn.init.normal_(model.lm_head.weight, std=0.09)
        return model

    def processor(self) -> LlavaProcessor:
        images = CLIPImageProcessorPil(
            size={"shortest_edge": SIZE},
            crop_size={"height": SIZE, "width": SIZE},
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        return LlavaProcessor(images, build.tokenizer(), chat_template=build.chat_template("<image>"), **LLAVA)

    def see(self, model: Any, heads: Heads, batch: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        states = clip_states(model.model.vision_tower, batch.pixels, batch.positions)
        visual = model.model.multi_modal_projector(states[-2][:, 1:]).float()
        return visual, presence_loss(heads, states, batch.fine.presence())

    def labels(self, batch: Pictures) -> torch.Tensor:
        return batch.fine.glyph

    def target(self, model: Any, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        return oracle(batch.fine, batch.fine.centre)
