"""Inside a padded vision tower (CLIP, SigLIP): every crop is a row of a batch.

Later layers really run on fewer patches. Towards the rest of the model shapes are restored after the projector: rows of
zeros stand for what was dropped and are removed at the language-model boundary, which is told which they are. Crops of
a batch may keep different counts: they are padded on the right (CLS stays in column 0) and padded keys are masked, so a
picture's result does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.state.run import FeatureCall, TokenHistory
from vtoken.hooks.vision import frames
from vtoken.hooks.vision.encoder_facts import EncoderLayer, biased
from vtoken.hooks.vision.merging import MergeInLayer, check_resized, log_size, move_to_visible_member
from vtoken.hooks.vision.tower import Tower, TowerState
from vtoken.stages import Fact, Keep, Parts, uploaded


@dataclass(kw_only=True)
class PaddedState(TowerState):
    """State of one tower call.

    Attributes:
        rows, columns: [ΣK] where each live patch sits in the padded batch (columns count CLS).
        valid: [crops, P] which columns of the padded batch are real, or None when all are.
        bias: [crops, P] float32, what is added to the logits of its keys, or None.
        patches: [ΣK] row of each live patch among all that is not padding, CLS included; None until it is asked for.
        merged: between attention and MLP of a layer, the merged tokens [crops, P, D].
        chosen: which frames of a video the crops are, or None when they are all that came.
    """

    rows: Tensor
    columns: Tensor
    valid: Tensor | None = None
    bias: Tensor | None = None
    patches: Tensor | None = None
    merged: Tensor | None = None
    chosen: frames.Chosen | None = None

    def packed(self, padded: Tensor) -> Tensor:
        """[crops, P, ...] -> [ΣP, ...] without padding."""
        return padded.flatten(0, 1) if self.valid is None else padded[self.valid.to(padded.device)]

    def restore(self, values: Tensor) -> Tensor:
        """[ΣK, ...] of live patches -> [crops, full, ...] with zeros where patches were dropped."""
        crops, full = len(self.history.full), self.history.full[0]
        if not self.short:
            return values.unflatten(0, (-1, full))
        out = values.new_zeros(crops, full, *values.shape[1:])
        out[self.rows.to(out.device), self.history.raster_index.to(out.device)] = values
        return out


class PaddedTower(Tower):
    """See `Tower`. Frames of a video that are not chosen never enter the tower."""

    def _behind(self) -> None:
        self.proportional = any(stage.merge_point() == "proportional" for stage in self.stages)
        MergeInLayer(self.run, self.context.handle, self.encoder.layers, self.merging, self._decide)
        self.context.handle.after(self.adapter.projectors[0], self._projector)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.adapter.check_call(kwargs)
        given = args[0] if args else kwargs["pixel_values"]
        call = self.run.call
        if any(self.merging.values()) and (call is None or call.skip_reason is None):
            check_resized(call)
        pixels, chosen = given, None
        skipped: tuple[bool, ...] = ()
        if call is not None and (self.choosers or call.skip_plan is not None):
            pixels, chosen, skipped = self._choose(call, given)
        crops, full, device = len(pixels), self.adapter.patches, pixels.device
        patch = torch.arange(full, device=device).repeat(crops)
        self.run.tower = state = PaddedState(
            history=TokenHistory((full,) * crops, patch),
            rows=torch.arange(crops, device=device).repeat_interleave(full),
            columns=patch + int(self.encoder.cls),
            chosen=chosen,
            skipped=skipped,
            skip_reason=None if call is None else call.skip_reason,
        )
        if self.choosers and call is not None and chosen is None:
            state.traces += frames.untouched(self.choosers, self.adapter.crops(call.arguments), full)
        if self.pixels:
            size: Any = self.adapter.tower.config.patch_size
            behind = torch.nn.functional.unfold(pixels.float(), size, stride=size).transpose(1, 2)
            state.facts[Fact("pixels")] = behind
        if pixels is given:
            return None
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def _choose(self, call: FeatureCall, pixels: Tensor) -> tuple[Tensor, frames.Chosen | None, tuple[bool, ...]]:
        """The crops that enter the tower, which frames they are, and which of them keep all their patches."""
        video = call.kind == "video"
        counts = [layout.parts[0][0] for layout in call.layouts] if video else self.adapter.crops(call.arguments)
        skipped = call.skipped(counts)
        if not self.choosers or not video:
            return pixels, None, skipped
        chosen = frames.choose(self.choosers, frames.thumbnails(pixels), counts, call.skipped([1] * len(counts)))
        left = tuple(skipped[i] for i in chosen.index.tolist()) if skipped else ()
        return pixels[chosen.index], chosen, left

    def _tap(self, module: Any, letters: Sequence[str]) -> nn.Module:
        for letter in letters:
            self.context.handle.after_child(module.self_attn, f"{letter}_proj", partial(self._keep, letter))
        attention: nn.Module = module.self_attn
        return attention

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        state, e = self.state, self.encoder
        projected = {name: state.packed(value).unflatten(-1, (e.heads, -1)) for name, value in state.taps.items()}
        turn = None if state.bias is None else partial(biased, bias=state.packed(state.bias), scale=e.scale)
        return EncoderLayer(projected, [n + e.cls for n in state.history.counts], e.scale, e.cls, turn=turn)

    def _per_token(self, value: Tensor) -> Tensor:
        state = self.state
        if not self.encoder.cls:
            return value.to(state.rows.device)
        if state.patches is None:
            # Packed row of each live patch: its rank, plus one CLS row for every crop up to its own.
            state.patches = torch.arange(1, 1 + len(state.rows), device=state.rows.device) + state.rows
        return value[state.patches.to(value.device)].to(state.rows.device)

    def _gather(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = self.state.rows, self.state.columns
        return hidden[rows.to(hidden.device), columns.to(hidden.device)], rows

    def _live(self, fact: Tensor) -> Tensor:
        return fact[self.state.rows, self.state.history.raster_index]

    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        side = math.isqrt(self.adapter.patches)
        return (((1, side, side),),) * len(self.state.history.full), None

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state, lengths, cls = self.state, keep.lengths, int(self.encoder.cls)
        crops, width, home = len(lengths), max(lengths), state.rows.device
        counts = uploaded(lengths, home)
        rows = torch.arange(crops, device=home).repeat_interleave(counts, output_size=sum(lengths))
        columns = torch.cat([torch.arange(n, device=home) for n in lengths]) + cls
        short = hidden.new_zeros(crops, width + cls, hidden.shape[2])
        if cls:
            short[:, 0] = hidden[:, 0]
        short[rows.to(hidden.device), columns.to(hidden.device)] = keep.apply(values)
        state.rows, state.columns, state.patches = rows, columns, None
        ragged = min(lengths) < width
        state.valid = torch.arange(width + cls, device=home) < (counts + cls)[:, None] if ragged else None
        state.bias = log_size(state, width + cls) if self.proportional else None
        return short

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Padded keys are masked."""
        valid, bias = self.state.valid, self.state.bias
        if valid is None and bias is None:
            return {}
        if valid is not None and "flash" in (self.adapter.tower.config._attn_implementation or ""):
            return {"attention_mask": valid.to(hidden.device).long()}
        mask = hidden.new_zeros(len(hidden), hidden.shape[1]) if bias is None else bias.to(hidden)
        if valid is not None:
            mask = mask.masked_fill(~valid.to(hidden.device), torch.finfo(hidden.dtype).min)
        return {"attention_mask": mask[:, None, None]}

    def _projector(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the projector: full shape again."""
        state, call = self.state, self.run.call
        if state is None:
            return None
        rows, columns = state.rows, state.columns - int(self.encoder.cls)
        if call is not None and state.history.full != tuple(layout.tokens for layout in call.layouts):
            move_to_visible_member(state, call, self.adapter.pack)
        if state.chosen is not None:
            frames.expand_to_all_frames(state, state.chosen)
        short = state.short

        def full(x: Tensor) -> Tensor:
            return state.restore(x[rows.to(x.device), columns.to(x.device)]) if short else x

        if self.features:
            state.facts[Fact("features")] = full(args[0]).detach()
        return full(out) if short else None
