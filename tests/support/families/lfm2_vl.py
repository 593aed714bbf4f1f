"""LFM2-VL: SigLIP 2 over crops of their own size, padded to 64 patches; every other decoder layer is a short
convolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import pytest
import torch
import transformers
from family import Draw, Family, Picture, Spec, listed
from tiny_models import IMG, PATCH, VISION_END, VISION_START
from torch import Tensor
from transformers.utils import is_torchvision_available

from vtoken.evals.cost.geometry.lfm2_vl import rasters

MOST = 64  # patches of a crop


class Tiny(Family):
    """A spec is (height, width) in pixels; what is above 16 tokens of 28 x 28 pixels by more than twice is cut into
    crops of 4 x 4 tokens, the whole scaled down behind them."""

    classes = "Lfm2Vl"
    marks = ("<|image_start|>", "<|image_end|>")
    image, other, odd = (84, 112), (112, 112), (56, 168)
    pictures = ((84, 112, 1), (112, 112, 1), (40, 300, 1), (200, 230, 1), (300, 150, 1))
    unpadded = (112, 112)
    crops_sized = True
    unit = 4
    states = (0, 2)
    offloads, reads_stem = False, True
    shipped_picture = 16
    checkpoints = {"LiquidAI/LFM2-VL-450M": 451, "LiquidAI/LFM2-VL-1.6B": 1585}
    # Sizes come with the call, and the model reads them on the host as well; the prompt tells which crops are a picture's.
    waits = (("asked", "lfm2_vl.py:layouts"), ("asked", "parted.py:side_by_side"))

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.cut: dict[tuple[tuple[int, int], ...], Spec] = {}  # crops -> a picture that has them

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        vision = {
            "model_type": "siglip2_vision_model",
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "patch_size": PATCH,
            "num_patches": 16,
            "vision_use_head": False,
        }
        kinds = ["conv" if k % 4 in self.states else "full_attention" for k in range(text.get("num_hidden_layers", 4))]
        decoder = {"model_type": "lfm2", "layer_types": kinds, "block_auto_adjust_ff_dim": False, **text}
        return {"text_config": decoder, "vision_config": vision, "image_token_id": IMG, "projector_hidden_size": 48}

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        if not is_torchvision_available():
            pytest.skip("Lfm2VlImageProcessor needs torchvision")
        sizes = {"encoder_patch_size": PATCH, "tile_size": 8 * PATCH, "min_image_tokens": 9, "max_image_tokens": 16}
        tokenizer.padding_side = "left"
        return kind(transformers.Lfm2VlImageProcessor(**sizes), tokenizer, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return ("img", (height, width))

    def crops(self, picture: Picture) -> list[tuple[int, int]]:
        """Rows and columns of tokens of each crop."""
        crops = [raster[1:] for raster in rasters(self.stock.config, picture.spec)]
        self.cut.setdefault(tuple(crops), picture.spec)
        return crops

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        """A mark in front, a word in front of every crop of several, a mark behind."""
        crops = self.crops(picture)
        marked = int(len(crops) > 1)
        return [VISION_START, *(i for crop in crops for i in [*words(marked), *[IMG] * prod(crop)]), VISION_END]

    def tokens(self, picture: Picture) -> int:
        return sum(map(prod, self.crops(picture)))

    def features(self, picture: Picture, **more: Tensor) -> Tensor:
        encode = self.stock.model.get_image_features
        return torch.cat(list(encode(**self.inputs([picture], torch.zeros), **more, return_dict=True).pooler_output))

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        crops = [(2 * rows, 2 * columns) for picture in pictures for rows, columns in self.crops(picture)]
        if not crops:
            return {}
        pixels = torch.zeros(len(crops), MOST, 3 * PATCH**2)
        mask = torch.zeros(len(crops), MOST, dtype=torch.int32)
        for i, crop in enumerate(crops):
            pixels[i, : prod(crop)] = draw(prod(crop), 3 * PATCH**2)
            mask[i, : prod(crop)] = 1
        return {"pixel_values": pixels, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor(crops)}

    def rows(self, picture: Picture) -> int:
        return len(self.crops(picture))

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        grids = [(r // 2, c // 2) for r, c in listed(batch, "spatial_shapes")]
        found, ids = [], batch["input_ids"].flatten().tolist()
        while grids:
            length = ids.index(VISION_END, ids.index(IMG)) - ids.index(IMG)
            shown = sum(i == IMG for i in ids[ids.index(IMG) :][:length])
            ids = ids[ids.index(IMG) + length :]
            many = next(n for n in range(1, len(grids) + 1) if sum(map(prod, grids[:n])) == shown)
            crops, grids = tuple(grids[:many]), grids[many:]
            # What is not cut is as large as its tokens.
            found.append(Picture("image", self.cut.get(crops) or (28 * crops[0][0], 28 * crops[0][1])))
        return found, []
