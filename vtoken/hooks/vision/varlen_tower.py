"""Inside a vision tower of variable length (Qwen): all images lie in one sequence of patches.

`unit` consecutive patches (a merge group) become one visual token. Stages see groups in token order; the tower may
store them in another one (windows). Whole groups are dropped and later blocks really run on fewer, in the tower's own
order, with the segment bounds and rotary embeddings of the survivors. The mergers' outputs get their length back with
rows of zeros, which are removed at the language-model boundary.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.state.run import ImageLayout, segments
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.vision import frames, resizing
from vtoken.hooks.vision.encoder_facts import EncoderLayer
from vtoken.hooks.vision.pixels import by_channel, choose
from vtoken.hooks.vision.tower import Tower, TowerState
from vtoken.stages import Fact, Keep, Parts, image_of, place_in_image


@dataclass(kw_only=True)
class VarlenState(TowerState):
    """State of one tower call. Tokens are counted over the whole batch.

    Attributes:
        layouts: of each image.
        image: [ΣN] image of each token.
        slot: [ΣN] place of each token's group in the tower's sequence before anything was dropped.
        live: [ΣK] token of each group that is left, in the tower's order.
        rotary: cos and sin of the live patches; bounds: whether attention is full -> cu_seqlens and longest segment of
            the live patches. Both are made again after every drop.
        plan: how pictures were made smaller, where they were: the state is then about the smaller ones.
    """

    layouts: tuple[ImageLayout, ...]
    image: Tensor
    slot: Tensor
    live: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    plan: resizing.Smaller | None = None
    bounds: dict[bool, tuple[Tensor, int | None]] = field(default_factory=dict)

    @property
    def arrangement(self) -> Tensor:
        return self.live

    def restore(self, values: Tensor, arrangement: Tensor | None = None) -> Tensor:
        return self.scatter(values, self.live if arrangement is None else arrangement)

    def in_tower_order(self, values: Tensor) -> Tensor:
        """As `restore`, where the model still has to undo the tower's order."""
        return self.scatter(values, self.slot[self.live])

    def scatter(self, values: Tensor, at: Tensor) -> Tensor:
        """[ΣN, ...] where row `at[i]` is values[i] and all others are 0."""
        out = values.new_zeros(len(self.slot), *values.shape[1:])
        out[at.to(values.device)] = values
        return out


class VarlenTower(Tower):
    """See `Tower`. All frames of a video are embedded; the blocks see those that are left."""

    def _groups(self, patches: Tensor) -> Tensor:
        """[unit*K, ...] -> [K, unit, ...]."""
        return patches.unflatten(0, (-1, self.encoder.unit))

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        call = self.run.call
        if not self.resizers or call is None:
            self._begin(pixels, grid, self.adapter.rasters(grid.tolist()) if call is None else call.layouts, kwargs)
            return None
        (stage,) = self.resizers
        plan = resizing.planned(stage, call.layouts, call.skipped([1] * len(call.layouts)), pixels.device)
        if not plan.acts:
            self._begin(pixels, grid, call.layouts, kwargs)
            self.state.traces.insert(0, plan.trace)
            return None
        side, depth = math.isqrt(self.encoder.unit), self.adapter.tower.config.temporal_patch_size
        pixels = resizing.resampled(pixels, plan, side, pixels.shape[1] // self._area(), depth)
        grid, layouts = plan.grid(side, grid), plan.layouts
        # What was worked out ahead from the grids is about the pictures as they were given.
        rest = {name: value for name, value in kwargs.items() if not torch.is_tensor(value)}
        self._begin(pixels, grid, layouts, rest)
        self.state.plan, self.state.resized = plan, plan.parts
        return (), {**rest, "hidden_states": pixels, "grid_thw": grid}

    def _area(self) -> int:
        """Pixels of a patch in one channel, over all frames that it spans."""
        config = self.adapter.tower.config
        area: int = config.temporal_patch_size * config.patch_size**2
        return area

    def _begin(self, pixels: Tensor, grid: Tensor, layouts: tuple[ImageLayout, ...], kwargs: dict) -> None:
        """Makes the state of a call, before the tower's first layer; frames and tokens are chosen by their pixels."""
        call, device = self.run.call, pixels.device
        full = tuple(layout.tokens for layout in layouts)
        order = self.adapter.order(grid, kwargs)
        live = torch.arange(sum(full), device=device) if order is None else order.to(device, non_blocking=True)
        image = image_of(full, device)
        history = TokenHistory(full, place_in_image(full, device), full)
        state = VarlenState(history=history, layouts=layouts, image=image, slot=live.argsort(), live=live)
        self.run.tower = state
        if call is not None:
            state.skipped, state.skip_reason = call.skipped([1] * len(layouts)), call.skip_reason
        if self.pixels:
            state.facts[Fact("pixels")] = self._groups(pixels.detach().float()).flatten(1)
        counts = [layout.parts[0][0] for layout in layouts]
        if self.by_pixels:
            still = max(counts) == 1 if call is None else call.kind == "image"
            choose(state, self.by_pixels, by_channel(pixels, self.encoder.unit, self._area()), still)
        if self.choosers:
            seen = frames.packed_thumbnails(pixels, layouts, math.isqrt(self.encoder.unit), self._area())
            frames.shorten(state, frames.choose(self.choosers, seen, counts, state.skipped), self.encoder.unit)

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        """After the tower, where it ran on smaller pictures than were given: full length again."""
        state = self.state
        return None if state is None or state.plan is None else resizing.put_back(state, state.plan, out)

    def _tap(self, module: Any, letters: list[str]) -> nn.Module:
        self.context.handle.after_child(module.attn, "qkv", partial(self._keep, "qkv"))
        attention: nn.Module = module.attn
        return attention

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        state, e = self.state, self.encoder
        q, k, v = state.taps["qkv"].unflatten(1, (3, e.heads, -1)).unbind(1)
        rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
        cos, sin = (half.to(q.device) for half in kwargs["position_embeddings"])
        return EncoderLayer(
            {"q": q, "k": k, "v": v},
            [n * e.unit for n in state.history.counts],
            e.scale,
            cls=False,
            bounds=kwargs["cu_seqlens"].to(q.device),
            turn=lambda q, k: rotate(q, k, cos, sin),
        )

    def _per_token(self, value: Tensor) -> Tensor:
        return self._groups(value).mean(1)

    def _entering(self, layer: int, hidden: Tensor) -> Tensor:
        if layer or not self.state.short:
            return hidden
        slots = self.state.slot[self.state.live].to(hidden.device)
        return self._groups(hidden)[slots].flatten(0, 1)

    def _in_order(self, values: Tensor) -> Tensor:
        return values[self.state.live.argsort().to(values.device)]

    def _gather(self, hidden: Tensor) -> Tensor:
        return self._in_order(self._groups(hidden))

    def _seen(self, values: Tensor) -> Tensor:
        return values.mean(1)

    def _live(self, fact: Tensor) -> Tensor:
        return fact[self.state.live.sort().values.to(fact.device)]

    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        segment = segments(self.state.layouts)
        live = None if segment is None else segment.to(self.state.live.device)[self.state.live.sort().values]
        return tuple(layout.parts for layout in self.state.layouts), live

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state = self.state
        token = state.live.sort().values[keep.index.to(state.live.device)]
        back = state.slot[token].argsort()
        state.live, state.rotary, state.bounds = token[back], None, {}
        return keep.apply(values)[back.to(hidden.device)].flatten(0, 1)

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        state, unit, full = self.state, self.encoder.unit, self.encoder.full_attention
        if not state.short:
            return {}
        slots = state.slot[state.live]
        if state.rotary is None:
            rows = (slots[:, None] * unit + torch.arange(unit, device=slots.device)).flatten()
            state.rotary = tuple(half[rows.to(half.device)] for half in kwargs["position_embeddings"])
        kind = full is None or layer in full
        if kind not in state.bounds:
            old = kwargs["cu_seqlens"]
            starts = torch.searchsorted(slots, old.to(slots) // unit) * unit
            bounds = starts.unique_consecutive().to(old)
            longest = None if kwargs.get("max_seqlen") is None else int(bounds.diff().max())
            state.bounds[kind] = bounds, longest
        bounds, longest = state.bounds[kind]
        found = {"cu_seqlens": bounds, "position_embeddings": state.rotary}
        return found if longest is None else {**found, "max_seqlen": longest}

    def _behind(self) -> None:
        for index, merger in enumerate(self.adapter.projectors):
            self.context.handle.after(merger, partial(self._merged, index))
        if self.features:
            self.context.handle.before(self.adapter.behind, self._left)
        if self.resizers:
            self.context.handle.after(self.adapter.tower, self._after)

    @torch.no_grad()
    def _left(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """After the last layer: notes the features."""
        if self.state is not None:
            self.state.facts[Fact("features")] = self.state.restore(self._per_token(args[0]))

    def _merged(self, index: int, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After a merger (the first makes the visual tokens): full length again, in the tower's order, which the model
        undoes."""
        state = self.state
        if state is None:
            return None
        if index:
            state.deep.append(state.alive())
        return state.in_tower_order(out) if state.short else None
