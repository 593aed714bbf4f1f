"""tiny-llava-next: a base crop of the whole picture and 2 x 2 crops of its quarters, each 96 pixels wide, by the tower
of tiny-llava.

A picture of 192 x 192 pixels costs 744 visual tokens: 144 of the base crop, where a glyph is half as large, then 24
rows of 24 with a newline behind each. Only the base crop tells where in the picture a glyph stands; a first decoder
layer of its own lets the other tokens find that out by colour.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
)

from vtoken.evals.reference import load

from . import build
from .batches import Labels, Pictures
from .dialogue import EVEN, REST, VOCABULARY, WEAK
from .family import LLAVA, Family, Heads, clip_states, presence_loss
from .oracle import Oracle
from .pictures import GRID, PATCH, SIZE
from .recipe import Joint, Recipe

CROP = SIZE // 2
SIDE = CROP // PATCH  # patches along a crop
PINPOINTS = [[SIZE, SIZE], [CROP, SIZE], [SIZE, CROP]]  # height, width


class TinyLlavaNext(Family):
    name = "tiny-llava-next"
    recipe = Recipe(
        full_batch=13,  # pictures of five crops
        language_cycles=((500, 1e-3, EVEN, (64, 128)), (400, 1e-3, REST, (64, 128, 256))),
        projector_cycles=(
            (500, 5e-4, "slanted", False),
            (400, 5e-4, "varied", False),
            (900, 6e-4, "varied", False),
            (500, 4e-4, "varied", False),
        ),
        projector_rate=5e-4,
        joint_cycles=(
            Joint(300, "varied", EVEN),
            Joint(250, "varied", WEAK, 0.5, turns=3),
            Joint(450, "varied", REST),
            Joint(250, "varied", REST, 0.4),
            Joint(300, "varied", WEAK, 0.6),
            Joint(350, "varied", WEAK, 0.6),
        ),
        joint_tokens=(64, 128, 256, 744),
    )
    plan = ("b1", "b2", "c1", "c2", "d1", "d2", "d3", "d4", "c3", "d5", "c4", "d6")
    tokens = SIDE * SIDE + GRID * (GRID + 1)

    def model(self) -> LlavaNextForConditionalGeneration:
        """Weights of the shipped tiny-llava; its positions are cut to those of one crop."""
        config = LlavaNextConfig(
            vision_config=build.clip(CROP),
            text_config=build.llama(5),
            image_token_index=VOCABULARY["<image>"],
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            image_grid_pinpoints=PINPOINTS,
            image_seq_length=SIDE * SIDE,
        )
        model = LlavaNextForConditionalGeneration(config)
        source, _ = load("tiny-llava")
        build.inherit(model, source)
        model.model.multi_modal_projector.load_state_dict(source.model.multi_modal_projector.state_dict())
        state = source.model.vision_tower.state_dict()
        table = "embeddings.position_embedding.weight"
        first, grid = state[table][:1], state[table][1:].view(GRID, GRID, -1)
        state[table] = torch.cat([first, grid[:SIDE, :SIDE].flatten(0, 1)])
        model.model.vision_tower.load_state_dict(state)
        return model

    def processor(self) -> LlavaNextProcessor:
        images = LlavaNextImageProcessorPil(
            size={"shortest_edge": CROP},
            crop_size={"height": CROP, "width": CROP},
            image_grid_pinpoints=PINPOINTS,
            image_mean=[0.5] * 3,
            image_std=[0.5] * 3,
        )
        return LlavaNextProcessor(images, build.tokenizer(), chat_template=build.chat_template("<image>"), **LLAVA)

    def see(self, model: Any, heads: Heads, batch: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        # the image processor resizes bytes: nothing leaves their range
        base = F.interpolate(batch.pixels, size=(CROP, CROP), mode="bicubic", antialias=True).clamp(-1, 1)
        pixels = torch.cat([base, _quarters(batch.pixels.permute(0, 2, 3, 1), CROP).permute(0, 3, 1, 2)])
        positions = torch.arange(SIDE * SIDE, device=pixels.device).expand(len(pixels), -1)
        states = clip_states(model.model.vision_tower, pixels, positions)
        shown = [batch.coarse.presence(), _crop_labels(batch.fine).presence()]
        held = presence_loss(heads, states, torch.cat(shown))
        features = model.model.multi_modal_projector(states[-2][:, 1:]).float()
        count = len(batch.pixels)
        whole = _whole(features[count:].unflatten(1, (SIDE, SIDE)))
        return self._packed(model, features[:count], whole), held

    def labels(self, batch: Pictures) -> torch.Tensor:
        rows = F.pad(batch.fine.glyph.view(-1, GRID, GRID), (0, 1))
        return torch.cat([batch.coarse.glyph, rows.flatten(1)], 1)

    def target(self, model: Any, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        base, fine = oracle(batch.coarse, batch.coarse.centre), oracle(batch.fine)
        return self._packed(model, base, fine.unflatten(1, (GRID, GRID))).detach()

    @staticmethod
    def _packed(model: Any, base: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
        """Base crop [B, n, D], then the rows of the whole picture [B, rows, columns, D] with a newline behind each."""
        newline = model.model.image_newline.expand(len(whole), GRID, 1, -1)
        return torch.cat([base, torch.cat([whole, newline.to(whole.dtype)], 2).flatten(1, 2)], 1)


def _quarters(whole: torch.Tensor, side: int) -> torch.Tensor:
    """[B, 2 side, 2 side, D] as crops [4 B, side, side, D], in reading order per picture."""
    return whole.unflatten(1, (2, side)).unflatten(3, (2, side)).transpose(2, 3).flatten(0, 2)


def _whole(crops: torch.Tensor) -> torch.Tensor:
    """The inverse of `_quarters`."""
    return crops.unflatten(0, (-1, 2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)


def _crop_labels(seen: Labels) -> Labels:
    parts = {name: _quarters(value.view(-1, GRID, GRID, 1), SIDE).flatten(1) for name, value in vars(seen).items()}
    return Labels(**parts)
