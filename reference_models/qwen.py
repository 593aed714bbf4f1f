"""tiny-qwen2.5-vl: any picture size, patches of 8 pixels merged 2 x 2, window attention in two of four blocks, M-RoPE.

The tower knows relative places only, so a visual token tells how far the centre of its glyph lies from its own. Two
decoder layers of their own turn that and the position of the token into the place in the picture; the layers of
tiny-llava follow.
"""

from typing import Any

import torch
from torch import nn
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
)

from vtoken.evals.processors import pictures_only
from vtoken.evals.reference import load

from . import build
from .batches import Pictures
from .dialogue import EVEN, REST, VOCABULARY, WEAK
from .family import Family, Heads, read_out_loss
from .oracle import Oracle
from .pictures import PATCH, SIZE
from .recipe import Joint, Recipe

MERGE = 2
CELL = MERGE * PATCH
SIDE = SIZE // CELL
EXTRA = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
SPECIAL = {word: len(VOCABULARY) + k for k, word in enumerate(EXTRA)}

PIXELS: dict[str, Any] = {"patch_size": PATCH, "merge_size": MERGE, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}


class TinyQwen(Family):
    name = "tiny-qwen2.5-vl"
    recipe = Recipe(
        language_cycles=((900, 1e-3, EVEN, (48, 96, 144)), (500, 1e-3, REST, (48, 96, 144))),
        projector_cycles=((1000, 1.5e-3, "varied", True), (400, 5e-4, "varied", False), (500, 5e-4, "varied", False)),
        joint_cycles=(
            Joint(300, "varied", EVEN),
            Joint(250, "varied", WEAK, 0.5, turns=3),
            Joint(350, "varied", WEAK, 0.6),
        ),
        joint_tokens=(24, 48, 96, 144),
    )
    plan = ("b1", "b2", "c1", "c2", "d1", "d2", "c3", "d3")
    tokens = SIDE * SIDE
    words = {**VOCABULARY, **SPECIAL}
    prefix = (*Family.prefix, "<|vision_start|>")
    suffix = ("<|vision_end|>",)
    video = {
        "video_processor_type": "Qwen2VLVideoProcessor",
        **PIXELS,
        "size": {"shortest_edge": 4 * CELL * CELL, "longest_edge": 16 * SIZE * SIZE},
    }
    hinted = 2

    def model(self) -> Qwen2_5_VLForConditionalGeneration:
        """A new tower; words and decoder of the shipped tiny-llava behind two new layers."""
        vision = {
            "depth": 4,
            "hidden_size": build.WIDTH,
            "intermediate_size": build.WIDTH,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "window_size": 4 * CELL,
            "fullatt_block_indexes": [1, 3],
            "out_hidden_size": build.WIDTH,
            "tokens_per_second": 2,
        }
        text = {
            **build.DECODER,
            "rms_norm_eps": 1e-6,
            "num_hidden_layers": 6,
            "vocab_size": len(self.words),
            # almost all waves go to columns: the questions are about left and right
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 2, 29]},
        }
        config = Qwen2_5_VLConfig(
            vision_config=vision,
            text_config=text,
            image_token_id=SPECIAL["<|image_pad|>"],
            video_token_id=SPECIAL["<|video_pad|>"],
            vision_start_token_id=SPECIAL["<|vision_start|>"],
            vision_end_token_id=SPECIAL["<|vision_end|>"],
        )
        model = Qwen2_5_VLForConditionalGeneration(config)
        build.inherit(model, load("tiny-llava")[0])
        return model

    def processor(self) -> Any:
        images = Qwen2VLImageProcessorPil(
            **PIXELS, size={"shortest_edge": 4 * CELL * CELL, "longest_edge": 4 * SIZE * SIZE}
        )
        around = "<|vision_start|>{}<|vision_end|>".format
        template = build.chat_template(around("<|image_pad|>"), around("<|video_pad|>"))
        return pictures_only(Qwen2_5_VLProcessor)(images, build.tokenizer(EXTRA), chat_template=template)

    def sight(self, model: Any) -> dict[str, nn.Module]:
        return {"tower": model.model.visual}

    def see(self, model: Any, heads: Heads, batch: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        patches, grid = patchified(batch.pixels)
        visual = model.model.visual(patches, grid_thw=grid).pooler_output.unflatten(0, (len(grid), -1)).float()
        return visual, read_out_loss(heads, visual, batch.coarse)

    def labels(self, batch: Pictures) -> torch.Tensor:
        return batch.coarse.glyph

    def target(self, model: Any, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        return oracle(batch.coarse, batch.coarse.offset)

    def hint(self, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        return oracle(batch.coarse, batch.coarse.centre)

    def places(self, keep: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
        """Time, row and column, [3, B, K]; text goes on behind the longer side."""
        return torch.stack([torch.zeros_like(keep), keep // SIDE, keep % SIDE]) + start, start + SIDE


def patchified(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [B, 3, S, S] as the image processor hands them to the tower: patches [sum of N, 3 * 2 * PATCH * PATCH],
    cells of 2 x 2 together, and grids [B, 3]."""
    count, grid = len(pixels), pixels.shape[-1] // PATCH
    cells = pixels.unflatten(3, (grid // MERGE, MERGE, PATCH)).unflatten(2, (grid // MERGE, MERGE, PATCH))
    patches = cells.permute(0, 2, 5, 3, 6, 1, 4, 7)[..., None, :, :].expand(*[-1] * 6, 2, -1, -1)
    return patches.flatten(0, 4).flatten(1), torch.tensor([[1, grid, grid]], device=pixels.device).repeat(count, 1)
