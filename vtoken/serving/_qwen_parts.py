"""What the config of a Qwen-VL says about its tower, and which stages do not fit it: known in the calling process,
before a model is built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters._packed import Packed
from vtoken.adapters.base import Encoder
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError, about
from vtoken.hooks.state.context import Context
from vtoken.hooks.vision.tower import OF_LAYER, check_windows
from vtoken.stages import Stage


class QwenParts(Packed):
    """Where vLLM's Qwen-VL keeps the parts that the hooks need.

    Args:
        config: of the checkpoint.
        visual: the tower, if it is built already.
    """

    model_type = "vllm"

    def __init__(self, config: Any, visual: Any = None) -> None:
        vision = config.vision_config
        depth, self.merge = vision.depth, vision.spatial_merge_size
        width = getattr(vision, "embed_dim", None) or vision.hidden_size  # in Qwen2-VL, hidden_size is that of the LLM
        full: Sequence[int] | None = getattr(vision, "fullatt_block_indexes", None)
        self.encoder = Encoder(
            layers=range(depth) if visual is None else visual.blocks,
            heads=vision.num_heads,
            scale=(width // vision.num_heads) ** -0.5,
            feature_layers=(depth - 1,),
            attention_layer=depth - 1 if full is None else max(full),
            full_attention=None if full is None else tuple(sorted(full)),
            unit=self.merge**2,
        )
        self.tower = visual
        self.placeholders = {"image": config.image_token_id, "video": config.video_token_id}

    def order(self, grid: Any, arguments: dict[str, Any]) -> Tensor | None:
        if self.encoder.full_attention is None:
            return None
        orders, start = [], 0
        for t, h, w in grid:
            orders.append(self.tower.get_rope_by_thw(t, h, w)[2] + start)
            start += t * h * w // self.encoder.unit
        return torch.cat(orders)

    def check(self, pipeline: Pipeline) -> None:
        """Checks the stages against the tower.

        Raises:
            UnsupportedError: names the stage.
        """
        context = Context(self, stages=pipeline.stages)
        with about(pipeline.written):
            for stage in pipeline.stages:
                self._check_stage(stage, context)

    def _check_stage(self, stage: Stage, context: Context) -> None:
        if why := stage.tower_incompatibility(self.encoder.width, self.encoder.unit):
            raise UnsupportedError(f"stage {stage.name} does not fit the vision tower: {why}")
        depth = len(self.encoder.layers)
        for need in stage.needs():
            if need.layer is not None and not -depth <= need.layer < depth:
                raise UnsupportedError(f"stage {stage.name} needs {need.name} of layer {need.layer}; there are {depth}")
            stored = context.resolve(need)
            if stored.layer is not None and stored.name in OF_LAYER:
                check_windows(self.encoder.full_attention, need.name, stored.layer, f"stage {stage.name}")
