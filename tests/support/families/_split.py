"""What Idefics3 and SmolVLM share: SigLIP over crops of a picture and the whole, which marks and text part in the
prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from family import Draw, Family, Picture
from tiny_models import IMG, PATCH, VISION_START
from torch import Tensor
from transformers.utils import is_torchvision_available

from vtoken.evals.cost.geometry._split import LONGEST, cuts

# (rows, columns) of crops; one crop is not cut.
SPECS = {1: (0, 0), 3: (1, 2), 5: (2, 2), 7: (2, 3), 9: (2, 4), 13: (3, 4), 17: (4, 4)}


class Split(Family):
    split = True
    marks = ("<fake_token_around_image>", "<end_of_utterance>")
    # As many crops as can be, rows or columns of them, and both ways in between.
    pictures = ((56, 56, 1), (300, 40, 1), (40, 300, 1), (333, 177, 1), (101, 99, 1))
    scale: int  # patches of a token along an edge
    across: int  # tokens of a crop along an edge
    images: Any  # its image processor
    halves: tuple[Any, ...] = ()  # what its processor takes behind the tokenizer
    # Which crops are real, and how the prompt parts them, is asked before they are encoded.
    waits = (("asked", "parted.py:real"), *(("asked", "parted.py:crops_of"),) * 2)

    @property
    def size(self) -> int:
        return self.scale * self.across * PATCH

    def fields(self, text: dict[str, Any]) -> dict[str, Any]:
        vision = {
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": self.size,
            "patch_size": PATCH,
        }
        return {
            "text_config": {"model_type": "llama", **text},
            "vision_config": vision,
            "scale_factor": self.scale,
            "image_token_id": IMG,
            "pad_token_id": text["pad_token_id"],
        }

    def processor(self, kind: Any, tokenizer: Any, **options: Any) -> Any:
        limits = {"size": {"longest_edge": LONGEST * self.size}, "max_image_size": {"longest_edge": self.size}}
        if not is_torchvision_available() and "torchvision" in getattr(self.images, "_backends", ()):
            pytest.skip(f"in transformers {transformers.__version__} {self.classes}ImageProcessorPil needs torchvision")
        return kind(self.images(**limits), tokenizer, *self.halves, image_seq_len=self.across**2, **options)

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return ("img", cuts(self.stock.config.vision_config, (height, width)))

    def crops(self, picture: Picture) -> int:
        rows, columns = picture.spec
        return rows * columns + 1

    def placeholders(self, picture: Picture, words: Callable[[int], list[int]]) -> list[int]:
        """A mark and a word in front of every crop, a word behind each row of them, a mark behind the picture."""
        rows, columns = picture.spec
        crop = [IMG] * self.across**2
        ids: list[int] = []
        for _ in range(rows):
            for _ in range(columns):
                ids += [VISION_START, *words(1), *crop]
            ids += words(1)
        return [*ids, *words(rows and 1), VISION_START, *words(1), *crop, VISION_START]

    def features(self, picture: Picture, **more: Tensor) -> Tensor:
        encode = self.stock.model.get_image_features
        # A crop of zeros is padding. Up to 5.17 the features are [crops, tokens, D].
        return torch.cat(list(encode(**self.inputs([picture], torch.ones), **more, return_dict=True).pooler_output))

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        if not pictures:
            return {}
        crops = [self.crops(p) for p in pictures]
        values = torch.zeros(len(pictures), max(crops), 3, self.size, self.size)
        for pixels, n in zip(values, crops, strict=True):
            pixels[:n] = draw(n, 3, self.size, self.size)
        return {"pixel_values": values}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        real = [int((pixels != 0).flatten(1).any(1).sum()) for pixels in batch.get("pixel_values", ())]
        return [Picture("image", SPECS[n]) for n in real], []
