"""Hooks inside a Qwen tower as vLLM runs it: reads what `hooks.vision` reads in transformers' tower, from vLLM's parts.

Classes that vLLM decorates for torch.compile (blocks, some mergers) run no hooks; the plain modules inside them do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_gather

from vtoken.config import Pipeline
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.run import FeatureCall, ImageLayout
from vtoken.hooks.vision.encoder_facts import EncoderLayer
from vtoken.hooks.vision.varlen_tower import VarlenTower
from vtoken.serving._qwen_parts import QwenParts
from vtoken.stages import Fact, offsets_of


class ServedTower(VarlenTower):
    """See `VarlenTower`. Drops nothing inside the tower.

    Args:
        parts: of the model, with its tower.
    """

    def __init__(self, parts: QwenParts, pipeline: Pipeline) -> None:
        super().__init__(Context(parts, stages=pipeline.stages))

    def start(self, kind: str, layouts: tuple[ImageLayout, ...]) -> None:
        """Called before the tower runs on these pictures, or videos."""
        self.run.call = FeatureCall(kind, {}, layouts)

    def read(self, need: Fact) -> Tensor:
        """[ΣN, ...] a fact about the pictures of this call."""
        found: Tensor = self.state.facts[self.context.resolve(need)]
        return found

    def forget(self) -> None:
        """Drops what was computed in a finished call."""
        self.run.call = self.run.tower = None

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0]
        if self.pixels and not pixels.is_floating_point():  # the processor leaves normalisation to the device
            pixels = cast(Any, module).input_norm(pixels, torch.float32)
        super()._start(module, (pixels, *args[1:]), kwargs)

    def _tap(self, module: Any, letters: Sequence[str]) -> nn.Module:
        self.context.handle.after(module.attn.qkv, self._qkv)
        return cast(nn.Module, module.attn)

    def _qkv(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        self._keep("qkv", out[0])

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        cos, sin = kwargs["rotary_pos_emb_cos"], kwargs["rotary_pos_emb_sin"]

        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            turned = module.apply_rotary_emb(torch.stack([q, k]), cos, sin)
            return turned[0], turned[1]

        layouts, unit = self.state.layouts, self.encoder.unit
        frames = [rows * columns * unit for ((n, rows, columns),) in (i.parts for i in layouts) for _ in range(n)]
        parts = _split(module, self.state.taps["qkv"])
        return EncoderLayer(
            dict(zip("qkv", map(_of_all_ranks, parts), strict=True)),
            [layout.tokens * unit for layout in layouts],
            self.encoder.scale,
            cls=False,
            # Not the bounds passed to attention, which some of vLLM's backends count in other units.
            bounds=offsets_of(frames, parts[0].device),
            turn=turn,
        )

    def _behind(self) -> None:
        if self.features:
            merger = self.adapter.tower.merger
            self.context.handle.before(merger.ln_q if hasattr(merger, "ln_q") else merger.norm, self._entering_merger)

    def _entering_merger(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if self.state is not None:
            self.state.facts[Fact("features")] = self.state.restore(self._per_token(args[0].flatten(0, -2)))


def _split(attention: Any, qkv: Tensor) -> list[Tensor]:
    """q, k and v [ΣM, H, d] for this rank's heads."""
    if hasattr(attention, "split_qkv"):  # Qwen2-VL: ranks hold columns, which split_qkv assigns to heads
        return [part.squeeze(1) for part in attention.split_qkv(qkv)]
    heads = attention.num_attention_heads_per_partition
    return list(qkv.squeeze(1).unflatten(1, (3, heads, -1)).unbind(1))


def _of_all_ranks(part: Tensor) -> Tensor:
    """[ΣM, H, d] for all heads; every tensor parallel rank holds some of them."""
    if get_tensor_model_parallel_world_size() == 1:
        return part
    whole: Tensor = tensor_model_parallel_all_gather(part.contiguous(), dim=1)
    return whole
