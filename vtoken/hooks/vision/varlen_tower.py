"""Inside a packed vision tower (Qwen): facts of chosen blocks, and stages that drop or merge between blocks.

All images lie in one sequence of patches, and `unit` consecutive patches (a merge group) become one visual token. Stages see groups in
token order; the tower may store them in another one (windows). Whole groups are dropped and later blocks really run on fewer, in the
tower's own order, with the segment bounds and rotary embeddings of the survivors. The mergers' outputs get their length back with rows of
zeros, which are removed at the language-model boundary.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.checkpointing import check_replay
from vtoken.hooks.state.decide import decide, leaves_some
from vtoken.hooks.state.fact_tables import GLOBAL, PROJECTIONS, substituted
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.live_tokens import skipped_entry
from vtoken.hooks.state.run import ImageLayout, Run, TokenHistory, segments
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision import encoder_facts as facts
from vtoken.hooks.vision import frames
from vtoken.stages import Fact, Stage, VisualTokens, image_of, offsets_of


@dataclass
class VarlenState:
    """State of one tower call. Tokens are counted over the whole batch.

    Attributes:
        layouts: of each image.
        image: [ΣN] image of each token.
        slot: [ΣN] place of each token's group in the tower's sequence before anything was dropped.
        live: [ΣK] token of each group that is left, in the tower's order.
        history: what became of every token of each image.
        rotary: cos and sin of the live patches; bounds: whether attention is full -> cu_seqlens and longest segment of the live
            patches. Both are made again after every drop.
        skipped: per image, whether it keeps all its tokens; empty when none does. `skip_reason` says why no stage acts at all, or None.
        qkv: output of the block at work.
        deep: per DeepStack merger, what was left when it ran, see `alive`.
        facts: [ΣN, ...] in token order, 0 where the token was dropped before the fact was read. `keys` and `values`
            [ΣN, H*d] are as projected (no rotary), `features` [ΣN, D] what enters the merger, means over the group;
            `pixels` [ΣN, unit*P] its patches one after the other.
    """

    layouts: tuple[ImageLayout, ...]
    image: Tensor
    slot: Tensor
    live: Tensor
    history: TokenHistory
    rotary: tuple[Tensor, Tensor] | None = None
    bounds: dict[bool, tuple[Tensor, int | None]] = field(default_factory=dict)
    skipped: tuple[bool, ...] = ()
    skip_reason: str | None = None
    qkv: Tensor | None = None
    deep: list[Tensor | None] = field(default_factory=list)
    facts: dict[Fact, Tensor] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    traces: list[StageTrace] = field(default_factory=list)

    @property
    def short(self) -> bool:
        return len(self.live) < len(self.slot)

    def restore(self, values: Tensor, at: Tensor) -> Tensor:
        """[ΣK, ...] in the tower's order -> [ΣN, ...] where row `at[i]` is values[i] and all others are 0."""
        out = values.new_zeros(len(self.slot), *values.shape[1:])
        out[at.to(values.device)] = values
        return out

    def alive(self) -> Tensor | None:
        """[ΣN] which tokens are left, in token order; None where all are."""
        return self.restore(torch.ones_like(self.live, dtype=torch.bool), self.live) if self.short else None


class VarlenTower:
    """Installs what the stages ask of the tower; nothing when they ask nothing. When the tower is done, `run.tower` holds what it found.

    Args:
        wanted: facts (with layers resolved) that stages after the tower need.
        stages: encoder-site stages, in pipeline order.
        choosers: frames-site stages. All frames are embedded; the blocks see those that are left.

    Raises:
        UnsupportedError: attention facts of a window layer.
    """

    def __init__(
        self,
        adapter: Any,
        run: Run,
        handle: Handle,
        wanted: set[Fact],
        stages: Sequence[Stage],
        choosers: Sequence[Stage] = (),
    ) -> None:
        self.choosers = choosers
        self.adapter, self.encoder, self.run = adapter, adapter.encoder, run
        depth = len(self.encoder.layers)
        stages = [stage.for_depth(depth) for stage in stages]
        self.at = {layer: [s for s in stages if layer in s.layers(depth)] for layer in range(depth)}
        per_layer: dict[int, set[Fact]] = {layer: set() for layer in range(depth)}
        asked: list[tuple[Fact, int | None, str]] = [(fact, None, "a later stage") for fact in wanted]
        asked += [(f, layer, f"stage {s.name}") for layer, acting in self.at.items() for s in acting for f in s.needs()]
        for fact, layer, who in asked:
            if fact.name in PROJECTIONS:
                read = self._layer_of(fact, layer)
                self._check(fact.name, read, who)
                per_layer[read].add(fact._replace(layer=read))
        if not asked and not stages and not choosers:
            return
        self.features = Fact("features") in wanted
        self.pixels = any(fact.name == "pixels" for fact, _, _ in asked)
        handle.before(adapter.tower, self._start)
        for layer, block in enumerate(self.encoder.layers):
            if per_layer[layer]:
                handle.after_child(block.attn, "qkv", self._tap)
                handle.after(block.attn, partial(self._facts, layer, sorted(per_layer[layer])))
            if (layer and stages) or choosers:
                handle.before(block, partial(self._block, layer))
        for index, merger in enumerate(adapter.projectors):
            handle.after(merger, partial(self._merged, index))

    def _layer_of(self, fact: Fact, acts_at: int | None) -> int:
        layer = acts_at if fact.layer is None else fact.layer % len(self.encoder.layers)
        assert layer is not None, f"{fact} came without a layer"
        return layer

    def _check(self, name: str, layer: int, who: str) -> None:
        full = self.encoder.full_attention
        if name.endswith("attention") and name not in GLOBAL and full is not None and layer not in full:
            raise UnsupportedError(
                f"{who} needs {name} of encoder layer {layer}, where tokens attend within windows only; the layers with full "
                f"attention are {', '.join(map(str, full))}: name one of them"
            )

    @property
    def tower(self) -> Any:
        return self.run.tower

    def _groups(self, patches: Tensor) -> Tensor:
        """[unit*K, ...] -> [K, unit, ...]."""
        return patches.unflatten(0, (-1, self.encoder.unit))

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels = args[0] if args else kwargs["hidden_states"]
        grid = args[1] if len(args) > 1 else kwargs["grid_thw"]
        call, device = self.run.call, pixels.device
        layouts = self.adapter.rasters(grid.tolist()) if call is None else call.layouts
        full = tuple(layout.tokens for layout in layouts)
        order = self.adapter.order(grid, kwargs)
        live = torch.arange(sum(full), device=device) if order is None else order.to(device, non_blocking=True)
        image = image_of(full, device)
        raster_index = torch.arange(len(image), device=device) - offsets_of(full, device)[:-1][image]
        self.run.tower = VarlenState(layouts, image, live.argsort(), live, TokenHistory(full, raster_index, full))
        if call is not None:
            self.tower.skipped, self.tower.skip_reason = call.skipped([1] * len(layouts)), call.skip_reason
        if self.pixels:
            self.tower.facts[Fact("pixels")] = self._groups(pixels.detach().float()).flatten(1)
        if self.choosers:
            config = self.adapter.tower.config
            area = config.temporal_patch_size * config.patch_size**2
            seen = frames.packed_thumbnails(pixels, layouts, math.isqrt(self.encoder.unit), area)
            counts = [layout.parts[0][0] for layout in layouts]
            chosen = frames.choose(self.choosers, seen, counts, self.tower.skipped)
            frames.shorten(self.tower, chosen, self.encoder.unit)

    def _tap(self, out: Tensor) -> None:
        if self.tower is not None:  # not when gradient checkpointing runs the block again
            self.tower.qkv = out

    @torch.no_grad()
    def _facts(self, layer: int, wanted: list[Fact], module: Any, args: tuple, kwargs: dict, out: Any) -> None:
        tower, unit = self.tower, self.encoder.unit
        if tower is None or tower.skip_reason is not None:
            return
        q, k, v = tower.qkv.unflatten(1, (3, self.encoder.heads, -1)).unbind(1)
        tower.qkv = None
        held = [n * unit for n in tower.history.lengths or tower.history.full]
        for fact in wanted:
            name = fact.name
            if name in ("keys", "values"):
                value = (k if name == "keys" else v).flatten(1)
            elif name in ("mean_value", "mean_key"):
                value = (v if name == "mean_value" else k).float().mean(1)
            elif name == "value_attention":
                value = facts.one_query(v, v, held, 1.0, False)
            else:
                rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
                queries, keys = rotate(q, k, *(half.to(q.device) for half in kwargs["position_embeddings"]))
                if name == "global_attention":
                    value = facts.one_query(queries, keys, held, self.encoder.scale, False)
                else:
                    bounds = kwargs["cu_seqlens"].to(q.device)
                    value = facts.received(queries, keys, bounds, self.encoder.scale, fact.above, False)
            tower.facts[fact] = tower.restore(value.unflatten(0, (-1, unit)).mean(1), tower.live)

    def _block(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before block `layer`: let the stages that act after the previous one decide, and hand on only what is left."""
        check_replay(module)
        given = args[0] if args else kwargs["hidden_states"]
        hidden = given
        if not layer and self.tower.short:
            slots = self.tower.slot[self.tower.live].to(hidden.device)
            hidden = self._groups(hidden)[slots].flatten(0, 1)
        for stage in self.at.get(layer - 1, ()):
            hidden = self._decide(stage, layer - 1, hidden)
        if hidden is given and not self.tower.short:
            return None
        if self.tower.short:
            kwargs = {**kwargs, **self._survivors(layer, kwargs)}
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _decide(self, stage: Stage, layer: int, hidden: Tensor) -> Tensor:
        tower, device = self.tower, hidden.device
        if tower.skip_reason is not None:
            tower.traces.append(skipped_entry(stage, tower.history, tower.skip_reason, layer))
            return hidden
        token, rank = tower.live.sort()
        groups = self._groups(hidden)[rank.to(device)]
        before, segment = tower.history.lengths, segments(tower.layouts)
        tokens = VisualTokens.pack(
            groups.mean(1),
            before,
            [layout.parts for layout in tower.layouts],
            range(len(before)),
            tower.history.raster_index.to(device),
            segment=None if segment is None else segment.to(device)[token.to(device)],
            facts={need: self._fact(need, layer)[token].to(device) for need in stage.needs()},
            layer=layer,
            memory=tower.memory.setdefault(id(stage), {}),
        )
        given = substituted(stage, self.adapter.substitutes)
        found = decide(
            stage,
            tokens,
            tower.history,
            tower.image[token],
            skipped=tower.skipped,
            amend=partial(leaves_some, stage),
            substitutes=given,
        )
        tower.history = found.history
        tower.traces.append(found.trace)
        if found.untouched:
            return hidden
        keep = found.keep
        token = token[keep.index.to(token.device)]
        back = tower.slot[token].argsort()
        tower.live, tower.rotary, tower.bounds = token[back], None, {}
        return keep.apply(groups)[back.to(device)].flatten(0, 1)

    def _fact(self, need: Fact, layer: int) -> Tensor:
        known = need.name in PROJECTIONS
        value = self.tower.facts[need._replace(layer=self._layer_of(need, layer)) if known else Fact(need.name)]
        return value.to(self.tower.live.device)

    def _survivors(self, layer: int, kwargs: dict) -> dict[str, Any]:
        """The block's arguments that go by patches, cut down to the live ones."""
        tower, unit, full = self.tower, self.encoder.unit, self.encoder.full_attention
        slots = tower.slot[tower.live]
        if tower.rotary is None:
            rows = (slots[:, None] * unit + torch.arange(unit, device=slots.device)).flatten()
            tower.rotary = tuple(half[rows.to(half.device)] for half in kwargs["position_embeddings"])
        kind = full is None or layer in full
        if kind not in tower.bounds:
            old = kwargs["cu_seqlens"]
            starts = torch.searchsorted(slots, old.to(slots) // unit) * unit
            bounds = starts.unique_consecutive().to(old)
            longest = None if kwargs.get("max_seqlen") is None else int(bounds.diff().max())
            tower.bounds[kind] = bounds, longest
        bounds, longest = tower.bounds[kind]
        found = {"cu_seqlens": bounds, "position_embeddings": tower.rotary}
        return found if longest is None else {**found, "max_seqlen": longest}

    def _merged(self, index: int, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After a merger (the first makes the visual tokens): full length again, in the tower's order, which the model undoes."""
        tower = self.tower
        if tower is None:
            return None
        if index:
            tower.deep.append(tower.alive())
        if index == 0 and self.features:
            hidden = self._groups(args[0].detach()).mean(1)
            tower.facts[Fact("features")] = tower.restore(hidden, tower.live)
        return tower.restore(out, tower.slot[tower.live]) if tower.short else None
