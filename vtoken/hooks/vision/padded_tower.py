"""Inside a padded vision tower (CLIP, SigLIP): facts of chosen layers, and stages that drop or merge between layers.

Later layers really run on fewer tokens. Towards the rest of the model shapes are restored after the projector: rows of zeros stand for what
was dropped and are removed at the language-model boundary, which is told which they are. Crops of a batch may keep
different counts: they are padded on the right (CLS stays in column 0) and padded keys are masked, so a picture's result does not
depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.state.checkpointing import check_replay
from vtoken.hooks.state.decide import decide
from vtoken.hooks.state.fact_tables import PROJECTIONS, substituted
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.live_tokens import skipped_entry
from vtoken.hooks.state.run import Run, TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision import encoder_facts as facts
from vtoken.hooks.vision import frames
from vtoken.hooks.vision.merging import MergeInLayer, check_resized, log_size, move_to_visible_member
from vtoken.stages import Fact, Parts, Stage, VisualTokens, uploaded


@dataclass
class PaddedState:
    """State of one tower call.

    Attributes:
        lengths: live patches per crop; full: patches per crop before anything was dropped.
        rows, columns: [Σlengths] where each live patch sits in the padded batch (columns count CLS).
        history: what became of every patch.
        valid: [crops, P] which columns of the padded batch are real, or None when all are.
        bias: [crops, P] float32, what is added to the logits of its keys, or None.
        merged: between attention and MLP of a layer, the merged tokens [crops, P, D].
        chosen: which frames of a video the crops are, or None when they are all that came.
        skipped: per crop, whether it keeps all its patches; empty when none does. `skip_reason` says why no stage acts at all, or None.
    """

    full: int
    lengths: tuple[int, ...]
    rows: Tensor
    columns: Tensor
    history: TokenHistory
    valid: Tensor | None = None
    bias: Tensor | None = None
    merged: Tensor | None = None
    chosen: frames.Chosen | None = None
    skipped: tuple[bool, ...] = ()
    skip_reason: str | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[Fact, Tensor] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    traces: list[StageTrace] = field(default_factory=list)

    @property
    def raster_index(self) -> Tensor:
        return self.history.raster_index

    def packed(self, padded: Tensor) -> Tensor:
        """[crops, P, ...] -> [ΣP, ...] without padding."""
        return padded.flatten(0, 1) if self.valid is None else padded[self.valid.to(padded.device)]

    @property
    def short(self) -> bool:
        return sum(self.lengths) < len(self.lengths) * self.full

    def restore(self, packed: Tensor) -> Tensor:
        """[Σlengths, ...] of live patches -> [crops, full, ...] with zeros where patches were dropped."""
        if not self.short:
            return packed.unflatten(0, (-1, self.full))
        out = packed.new_zeros(len(self.lengths), self.full, *packed.shape[1:])
        out[self.rows.to(out.device), self.raster_index.to(out.device)] = packed
        return out

    def alive(self) -> Tensor | None:
        """[crops, full] which patches are left; None where all are."""
        return self.restore(torch.ones_like(self.raster_index, dtype=torch.bool)) if self.short else None


class PaddedTower:
    """Installs what the stages ask of the tower; nothing when they ask nothing.

    Args:
        wanted: facts (with layers resolved) that stages after the tower need.
        stages: encoder-site stages, in pipeline order.
        choosers: frames-site stages.
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
        last = min(self.encoder.feature_layers)
        self.at = {i: [s for s in stages if s.merge_point() is None and i in s.layers(depth)] for i in range(depth)}
        between = {
            i: [s for s in stages if s.merge_point() and i in s.layers(depth) and i <= last] for i in range(depth)
        }
        self.merges = any(between.values())
        self.proportional = any(s.merge_point() == "proportional" for s in stages)
        per_layer: dict[int, set[Fact]] = {layer: set() for layer in range(depth)}
        for fact in wanted:
            if fact.name in PROJECTIONS and fact.layer is not None:
                per_layer[fact.layer].add(fact)
        for layer in range(depth):
            acting = self.at[layer] + between[layer]
            for served in (self._served(f, layer) for stage in acting for f in stage.needs()):
                assert served.layer is not None
                per_layer[served.layer].add(served)
        if not wanted and not stages and not choosers:
            return
        self.features = any(f.name == "features" for f in wanted)
        self.pixels = any(f.name == "pixels" for f in wanted)
        handle.before(adapter.tower, self._start)
        for layer, module in enumerate(self.encoder.layers):
            if per_layer[layer]:
                for name in facts.projections(fact.name for fact in per_layer[layer]):
                    handle.after_child(module.self_attn, name, partial(self._tap, name))
                handle.after(module.self_attn, partial(self._facts, layer, sorted(per_layer[layer])))
            if layer and stages:
                handle.before(module, partial(self._layer, layer))
        MergeInLayer(run, handle, self.encoder.layers, between, self._decide)
        handle.after(adapter.projectors[0], self._projected)

    def _served(self, fact: Fact, layer: int) -> Fact:
        """What a stage that acts after `layer` is given for a fact."""
        name = self.adapter.substitutes.get(fact.name, fact.name)
        return Fact(name, layer if fact.layer is None else fact.layer % len(self.encoder.layers), fact.above)

    @property
    def tower(self) -> Any:
        return self.run.tower

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.adapter.check_call(kwargs)
        given = pixels = args[0] if args else kwargs["pixel_values"]
        call, chosen = self.run.call, None
        skipped: tuple[bool, ...] = ()
        skip_reason = None if call is None else call.skip_reason
        if self.merges and skip_reason is None:
            check_resized(call)
        if call is not None and (self.choosers or call.skip_plan is not None):
            video = call.kind == "video"
            counts = [layout.parts[0][0] for layout in call.layouts] if video else self.adapter.crops(call.arguments)
            skipped = call.skipped(counts)
            if self.choosers and video:
                chosen = frames.choose(
                    self.choosers, frames.thumbnails(pixels), counts, call.skipped([1] * len(counts))
                )
                pixels = pixels[chosen.index]
                skipped = tuple(skipped[i] for i in chosen.index.tolist()) if skipped else ()
        crops, full, device = len(pixels), self.adapter.patches, pixels.device
        patch = torch.arange(full, device=device).repeat(crops)
        rows = torch.arange(crops, device=device).repeat_interleave(full)
        self.run.tower = PaddedState(
            full, (full,) * crops, rows, patch + int(self.encoder.cls), TokenHistory((full,) * crops, patch)
        )
        self.tower.chosen, self.tower.skipped, self.tower.skip_reason = chosen, skipped, skip_reason
        if self.choosers and call is not None and chosen is None:
            self.tower.traces += frames.untouched(self.choosers, self.adapter.crops(call.arguments), full)
        if self.pixels:
            size: Any = self.adapter.tower.config.patch_size
            behind = torch.nn.functional.unfold(pixels.float(), size, stride=size).transpose(1, 2)
            self.run.tower.facts[Fact("pixels")] = behind
        if pixels is given:
            return None
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def _tap(self, name: str, out: Tensor) -> None:
        if self.tower is not None:  # not when gradient checkpointing runs the layer again
            self.tower.taps[name] = out

    @torch.no_grad()
    def _facts(self, layer: int, wanted: list[Fact], module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        tower, e = self.tower, self.encoder
        if tower is None or tower.skip_reason is not None:
            return
        packed = {k: tower.packed(v) for k, v in tower.taps.items()}
        bias = None if tower.bias is None else tower.packed(tower.bias)
        tower.taps = {}
        # Packed row of each live patch: its rank, plus one CLS row for every crop up to its own.
        patches = torch.arange(len(tower.rows), device=tower.rows.device) + (tower.rows + 1 if e.cls else 0)
        for fact in wanted:
            value = facts.compute(fact, packed, tower.lengths, e.heads, e.scale, e.cls, bias)
            tower.facts[fact] = tower.restore(value[patches.to(value.device)].to(tower.rows.device))

    def _layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before layer `layer`: let the stages that act after the previous one decide, and mask padded keys."""
        check_replay(module)
        hidden = args[0] if args else kwargs["hidden_states"]
        for stage in self.at[layer - 1]:
            hidden = self._decide(stage, layer - 1, hidden)
        mask = self._mask(hidden)
        if not self.at[layer - 1] and mask is None:
            return None
        if args:
            args = (hidden, *args[1:])
        else:
            kwargs = {**kwargs, "hidden_states": hidden}
        if len(args) > 1:
            return (hidden, mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def _decide(self, stage: Stage, layer: int, hidden: Tensor) -> Tensor:
        tower = self.tower
        if tower.skip_reason is not None:
            tower.traces.append(skipped_entry(stage, tower.history, tower.skip_reason, layer))
            return hidden
        device, crops, cls = hidden.device, len(tower.lengths), self.encoder.cls
        rows, raster_index = tower.rows, tower.raster_index
        known = {f: tower.facts[self._served(f, layer)][rows, raster_index] for f in stage.needs()}
        memory = tower.memory.setdefault(id(stage), {})
        x = hidden[rows.to(device), tower.columns.to(device)]
        tokens = VisualTokens.pack(
            x,
            tower.lengths,
            self.parts(crops),
            tuple(range(crops)),
            raster_index.to(device),
            facts=known,
            layer=layer,
            memory=memory,
            size=tower.history.size(),
            lead=int(cls),
        )
        given = substituted(stage, self.adapter.substitutes)
        found = decide(stage, tokens, tower.history, rows, skipped=tower.skipped, substitutes=given)
        tower.history = found.history
        tower.traces.append(found.trace)
        if found.untouched:
            return hidden
        keep, lengths = found.keep, found.keep.lengths
        width = max(lengths)
        short = hidden.new_zeros(crops, width + cls, hidden.shape[2])
        if cls:
            short[:, 0] = hidden[:, 0]
        counts = uploaded(lengths, rows.device)
        rows = torch.arange(crops, device=rows.device).repeat_interleave(counts, output_size=sum(lengths))
        columns = torch.cat([torch.arange(n, device=rows.device) for n in lengths]) + cls
        short[rows.to(device), columns.to(device)] = keep.apply(x)
        tower.lengths, tower.rows, tower.columns = lengths, rows, columns
        ragged = min(lengths) < width
        tower.valid = torch.arange(width + cls, device=rows.device) < (counts + cls)[:, None] if ragged else None
        tower.bias = log_size(tower, width + cls) if self.proportional else None
        return short

    def _mask(self, hidden: Tensor) -> Tensor | None:
        valid, bias = self.tower.valid, self.tower.bias
        if valid is None and bias is None:
            return None
        if valid is not None and "flash" in (self.adapter.tower.config._attn_implementation or ""):
            return valid.to(hidden.device).long()
        mask = hidden.new_zeros(len(hidden), hidden.shape[1]) if bias is None else bias.to(hidden)
        if valid is not None:
            mask = mask.masked_fill(~valid.to(hidden.device), torch.finfo(hidden.dtype).min)
        return mask[:, None, None]

    def parts(self, crops: int) -> tuple[Parts, ...]:
        side = math.isqrt(self.adapter.patches)
        return (((1, side, side),),) * crops

    def _projected(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the projector: full shape again."""
        tower = self.tower
        if tower is None:
            return None
        rows, columns = tower.rows, tower.columns - int(self.encoder.cls)
        call = self.run.call
        if call is not None and tower.history.full != tuple(layout.tokens for layout in call.layouts):
            move_to_visible_member(tower, call, self.adapter.pack)
        if tower.chosen is not None:
            frames.expand_to_all_frames(tower, tower.chosen)
        short = tower.short

        def full(x: Tensor) -> Tensor:
            return tower.restore(x[rows.to(x.device), columns.to(x.device)]) if short else x

        if self.features:
            tower.facts[Fact("features")] = full(args[0]).detach()
        return full(out) if short else None
