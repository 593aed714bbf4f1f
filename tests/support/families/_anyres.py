"""What NeXT and OneVision share: pictures cut into crops, with their sizes beside them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from family import Draw, Family, Picture, listed
from tiny_models import IMG, PINPOINTS, SIZE
from torch import Tensor

ANYRES = {"image_grid_pinpoints": PINPOINTS, "image_token_index": IMG}


class Anyres(Family):
    image = (100, 60)
    anyres = True
    # Sizes come with the call, and the model reads them on the host as well; newlines that stay depend on what was
    # kept.
    waits = (
        ("asked", "features.py:<dictcomp>"),
        ("asked", "image_spans.py:check"),
        ("asked", "prefill_state.py:leave"),
    )

    def item(self, height: int, width: int, frames: int = 1) -> Any:
        return ("img", (height, width)) if frames == 1 else ("video", frames)

    def crops(self, picture: Picture) -> int:
        if picture.single:
            return 1
        upstream = sys.modules[f"transformers.models.{self.name}.modeling_{self.name}"]
        return upstream.image_size_to_num_patches(list(picture.spec), PINPOINTS, SIZE)

    def inputs(self, pictures: Sequence[Picture], draw: Draw) -> dict[str, Tensor]:
        images = [p for p in pictures if p.kind == "image"]
        if not images:
            return {}
        crops = [self.crops(p) for p in images]
        values = torch.zeros(len(images), max(crops), 3, SIZE, SIZE)
        for pixels, n in zip(values, crops, strict=True):
            pixels[:n] = draw(n, 3, SIZE, SIZE)
        return {"pixel_values": values, "image_sizes": torch.tensor([p.spec for p in images])}

    def found(self, batch: dict[str, Tensor]) -> tuple[list[Picture], list[Picture]]:
        return [Picture("image", tuple(size)) for size in listed(batch, "image_sizes")], []
