"""Hooks inside a CLIP or SigLIP tower as vLLM runs it: does what `hooks.vision` does in transformers' tower, with
vLLM's parts.

The differences: q, k and v come from one projection, which under tensor parallelism holds some of the heads; the tower
is built only up to the feature layer; attention takes no mask, but the bounds of concatenated sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed import (
    get_tensor_model_parallel_world_size,
    get_tp_group,
    tensor_model_parallel_all_gather,
    tensor_model_parallel_all_reduce,
)

from vtoken.adapters.base import Adapter, Encoder
from vtoken.config import Pipeline
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.vision.encoder_facts import EncoderLayer
from vtoken.hooks.vision.padded_tower import PaddedTower
from vtoken.serving._clip import ClipLike
from vtoken.stages import Fact, Keep, Stage
from vtoken.stages.tokens import Fused


class Parts(Adapter):
    """Where vLLM's LLaVAs keep the parts that the hooks need."""

    model_type = "vllm"

    def __init__(self, model: Any) -> None:
        tower = ClipLike(model.config)
        self.model = self.outer = model
        self.tower, self.projectors = model.vision_tower.vision_model, (model.multi_modal_projector,)
        built = list(self.tower.encoder.layers)
        # Layers are counted from the end of the whole tower, but only the first ones are built.
        layers = [*built, *(nn.Identity() for _ in range(tower.depth - len(built)))]
        features = tower.feature_layers
        self.encoder = Encoder(layers, tower.heads, tower.scale, features, max(features), tower.cls)
        self.side, self.patches = tower.side, tower.side**2
        self.placeholders = {}

    def layouts(self, kind: str, arguments: dict[str, Any]) -> tuple[ImageLayout, ...]:
        return (ImageLayout(((1, self.side, self.side),)),) * len(arguments["pixel_values"])


class ServedTower(PaddedTower):
    """See `PaddedTower`. Crops that keep different counts are padded in the layers, and packed for attention.

    Args:
        model: one of vLLM's LLaVAs.
    """

    def __init__(self, model: Any, pipeline: Pipeline) -> None:
        parts = Parts(model)
        # If stages act inside the tower, all pictures have one size, either below min_visual_tokens or not.
        guarded = parts.patches < pipeline.min_visual_tokens
        stages = tuple(stage for stage in pipeline.stages if stage.site == "tokens" or not guarded)
        super().__init__(Context(parts, stages=stages))

    @property
    def side(self) -> int:
        """Patches along the edge of a crop."""
        return cast(Parts, self.adapter).side

    def _install(self, per_layer: dict[int, set[Fact]]) -> None:
        super()._install(per_layer)
        for module in self.encoder.layers if self.stages else ():
            if isinstance(module, nn.Identity):
                continue
            self.context.handle.before(module.self_attn.attn, self._pack)
            self.context.handle.after(module.self_attn.attn, self._unpack)

    def _tap(self, module: Any, letters: Sequence[str]) -> nn.Module:
        assert not isinstance(module, nn.Identity), "the tower was built for another pipeline"
        self.context.handle.after(module.self_attn.qkv_proj, self._projections)
        return cast(nn.Module, module.self_attn)

    def _projections(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        self.state.taps = dict(zip("qkv", out[0].chunk(3, -1), strict=True))

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        state, e = self.state, self.encoder
        width = module.head_dim
        projected = {name: state.batch.packed(value).unflatten(-1, (-1, width)) for name, value in state.taps.items()}
        return EncoderLayer(projected, [n + e.cls for n in state.history.counts], e.scale, e.cls)

    def _compute(self, fact: Fact, layer: EncoderLayer) -> Tensor:
        """Computes a fact over all heads; every rank holds some of them."""
        ranks = get_tensor_model_parallel_world_size()
        if ranks == 1:
            return super()._compute(fact, layer)
        if fact.above:  # all heads together decide which queries count
            whole = {name: _gathered(value, 1) for name, value in layer.projected.items()}
            return super()._compute(fact, replace(layer, projected=whole))
        value = super()._compute(fact, layer).contiguous()
        if fact.name in ("keys", "values"):
            return _gathered(value, -1)
        return tensor_model_parallel_all_reduce(value) / ranks

    def _amend(self, stage: Stage, keep: Keep) -> Keep:
        return agreed(keep)

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        return {}

    def _pack(self, module: Any, args: tuple, kwargs: dict) -> Any:
        """Before attention: [crops, P, C] -> [1, ΣP, C], and the start of each crop."""
        if not self.state.batch.ragged:
            return None
        batch, cls = self.state.batch, int(self.encoder.cls)
        bounds = np.cumsum([0, *(n + cls for n in batch.counts)], dtype=np.int32)
        kind, width, device = module.attn_backend, args[0].shape[-1], args[0].device
        ranks = get_tensor_model_parallel_world_size()
        longest = torch.tensor(module.compute_max_seqlen(kind, bounds), dtype=torch.int32)
        packed = tuple(batch.packed(value)[None] for value in args)
        whole = width * ranks
        # These copies are contiguous, so no hidden size padded for fp8 applies.
        bounds_there = module.maybe_recompute_cu_seqlens(
            kind, bounds, whole, ranks, device, fp8_padded_hidden_size=whole
        )
        return packed, {
            "cu_seqlens": bounds_there,
            "max_seqlen": longest,
            "sequence_lengths": module.maybe_compute_seq_lens(kind, bounds, device),
        }

    def _unpack(self, module: Any, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After attention: [1, ΣP, C] -> [crops, P, C]."""
        if not self.state.batch.ragged:
            return None
        valid = self.state.batch.valid
        padded = out.new_zeros(*valid.shape, out.shape[-1])
        padded[valid.to(out.device)] = out[0]
        return padded

    def fact(self, need: Fact) -> Tensor:
        """[ΣN, ...] for all patches in the tower's order; 0 for patches dropped before the fact was read."""
        found: Tensor = self.state.facts[self.context.resolve(need)]
        return found

    def forget(self) -> None:
        """Drops what was computed in a finished call."""
        self.run.tower = None


def _gathered(value: Tensor, dim: int) -> Tensor:
    gathered: Tensor = tensor_model_parallel_all_gather(value.contiguous(), dim)
    return gathered


def agreed(keep: Keep) -> Keep:
    """The decision of the first tensor parallel rank; otherwise ranks that round differently could keep different
    tokens."""
    if get_tensor_model_parallel_world_size() == 1:
        return keep
    sent: dict[str, Any] = {"index": keep.index, "into": keep.into, "weight": keep.weight}
    fused = keep.fused
    if fused is not None:
        sent |= {"slots": fused.slots, "factor": fused.factor}
    sent = get_tp_group().broadcast_tensor_dict(sent, src=0)
    if fused is not None:
        fused = Fused(sent["slots"], sent["factor"], fused.features, fused.largest)
    return replace(keep, index=sent["index"], into=sent["into"], weight=sent["weight"], fused=fused)
