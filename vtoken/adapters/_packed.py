"""What the Qwen-VL, GLM-4V and PaddleOCR-VL families share: one packed sequence of patches for all images, and 2 x 2
patches merged into a token after the tower."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, ClassVar

import torch

from vtoken.adapters.base import Adapter, Encoder
from vtoken.hooks.state.run import ImageLayout

GRIDS = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}


class Packed(Adapter):
    """Finds tower, mergers and decoder. A video is one layout with all its frames, even where timestamps
    separate them in the prompt."""

    features: ClassVar[dict[str, str]] = {"image": "get_image_features", "video": "get_video_features"}
    mrope: ClassVar[bool] = True

    def __init__(self, model: Any) -> None:
        self.find(model, tower="visual")
        self.projectors = (self.tower.merger, *getattr(self.tower, "deepstack_merger_list", ()))
        self.behind = self.projectors[0]
        self.merge = self.tower.spatial_merge_size
        blocks, full = self.tower.blocks, self.full_attention()
        read = len(blocks) - 1 if full is None else max(full)
        self.encoder = Encoder.of(
            blocks, attention="attn", attention_layer=read, full_attention=full, packed=True, unit=self.merge**2
        )
        config = model.config
        self.placeholders = {"image": config.image_token_id, "video": config.video_token_id}

    def full_attention(self) -> tuple[int, ...] | None:
        """The layers where every token attends to all others of its image; None: all of them."""
        return None

    def rasters(self, grid: Sequence[Sequence[int]]) -> tuple[ImageLayout, ...]:
        layouts = []
        for frames, rows, columns in grid:
            rows, columns = rows // self.merge, columns // self.merge
            segment = torch.arange(frames).repeat_interleave(rows * columns) if frames > 1 else None
            layouts.append(ImageLayout(((frames, rows, columns),), segment))
        return tuple(layouts)

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        pixels, grid = (arguments.get(name) for name in GRIDS[kind])
        if pixels is None or grid is None:
            raise ValueError(
                f"{self.model_type} needs {' and '.join(GRIDS[kind])} to encode; pass what its processor returns"
            )
        sizes = grid.tolist()
        patches = sum(map(prod, sizes))
        if len(pixels) != patches:
            raise ValueError(
                f"{GRIDS[kind][0]} holds {len(pixels)} patches, but {GRIDS[kind][1]} tells of {patches}; pass both as "
                "one call of the processor returned them"
            )
        return self.rasters(sizes)
