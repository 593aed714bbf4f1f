"""Inside a padded vision tower (CLIP, SigLIP): every crop is a row of a batch.

Later layers really run on fewer patches. Towards the rest of the model shapes are restored after the projector, or
before the model pools patches ahead of it: rows of zeros stand for what was dropped and are removed at the
language-model boundary, which knows them. Crops of a batch may keep different counts: they are padded on
the right (CLS stays in column 0) and padded keys are masked, so a picture's result does not depend on its neighbours.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.state.run import FeatureCall
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.vision import frames
from vtoken.hooks.vision.encoder_facts import EncoderLayer, biased
from vtoken.hooks.vision.masked_layer import MaskedLayer
from vtoken.hooks.vision.merging import MergeInLayer, check_interpolated, move_to_visible_member
from vtoken.hooks.vision.tower import Tower, TowerState
from vtoken.stages import Fact, Keep, Parts, image_of, place_in_image, uploaded


@dataclass(frozen=True)
class Batch:
    """How the live patches of crops lie in a padded batch.

    Attributes:
        counts: live patches of each crop.
        cls: number of CLS tokens in front of every crop.
        width: columns of the batch without CLS, where they may be more than the patches of the fullest crop.
    """

    counts: tuple[int, ...]
    cls: int
    device: torch.device
    width: int = 0

    @property
    def columns(self) -> int:
        return max(self.width, *self.counts)

    @property
    def ragged(self) -> bool:
        return min(self.counts) < self.columns

    @cached_property
    def valid(self) -> Tensor | None:
        """[crops, P] which columns are real, CLS included; None when all are."""
        if not self.ragged:
            return None
        counts = uploaded([n + self.cls for n in self.counts], self.device)
        return torch.arange(self.columns + self.cls, device=self.device) < counts[:, None]

    @cached_property
    def at(self) -> tuple[Tensor, Tensor]:
        """Row and column of each live patch [ΣK]; columns count CLS."""
        return image_of(self.counts, self.device), place_in_image(self.counts, self.device) + self.cls

    def of(self, counts: tuple[int, ...]) -> Batch:
        """The batch of fewer patches, of another width: by their width hidden states tell which of the two they are."""
        return Batch(counts, self.cls, self.device, self.columns + 1 if max(counts) == self.columns else 0)

    def mask(self, hidden: Tensor, flash: bool = False, bias: Tensor | None = None) -> Tensor | None:
        """[crops, 1, 1, P] added to the logits of keys, `bias` [crops, P] included; for flash attention [crops, P], 1
        at real keys. None without padding and bias."""
        if self.valid is None:
            return None if bias is None else bias.to(hidden)[:, None, None]
        valid = self.valid.to(hidden.device)
        if flash:
            return valid.long()
        mask = hidden.new_zeros(valid.shape) if bias is None else bias.to(hidden)
        return mask.masked_fill(~valid, torch.finfo(hidden.dtype).min)[:, None, None]

    def packed(self, padded: Tensor) -> Tensor:
        """[crops, P, ...] -> [ΣP, ...] without padding."""
        if not self.ragged:
            return padded.flatten(0, 1)
        counts = [n + self.cls for n in self.counts]
        return padded[image_of(counts, padded.device), place_in_image(counts, padded.device)]

    def patches(self, padded: Tensor) -> Tensor:
        """[crops, P, ...] -> [ΣK, ...] without padding and CLS."""
        if not self.ragged:
            return padded[:, self.cls :].flatten(0, 1)
        rows, columns = self.at
        return padded[rows.to(padded.device), columns.to(padded.device)]

    def pad(self, values: Tensor, lead: Tensor | None = None) -> Tensor:
        """[ΣK, ...] -> [crops, P, ...], CLS `lead` [crops, 1, ...] (None: zeros) in front of every crop."""
        if not self.ragged:
            short = values.unflatten(0, (len(self.counts), -1))
            if not self.cls or lead is not None:
                return short if lead is None else torch.cat([lead, short], 1)
            return torch.nn.functional.pad(short, [0, 0] * (short.ndim - 2) + [self.cls, 0])
        rows, columns = (index.to(values.device) for index in self.at)
        out = values.new_zeros(len(self.counts), self.columns + self.cls, *values.shape[1:])
        if lead is not None:
            out[:, :1] = lead
        out[rows, columns] = values
        return out


@dataclass(kw_only=True)
class PaddedState(TowerState):
    """State of one tower call.

    Attributes:
        batch: where the live patches lie.
        bias: [crops, P] float32, what is added to the logits of its keys, or None.
        merged: between attention and MLP of a layer, the merged tokens [crops, P, D].
        nothing: [1, 1, 1] zero, in place of what was merged.
        chosen: which frames of a video the crops are; None when all crops that were given entered.
        by_unit: whether live patches lie unit by unit (`UnitTower`), not row by row.
        pooled: the model pools patches ahead of its projector, and has been given the full shape.
    """

    batch: Batch
    bias: Tensor | None = None
    merged: Tensor | None = None
    nothing: Tensor | None = None
    chosen: frames.Chosen | None = None
    by_unit: bool = False
    pooled: bool = False

    @property
    def arrangement(self) -> TokenHistory:
        return self.history

    def restore(self, values: Tensor, arrangement: TokenHistory | None = None) -> Tensor:
        """[ΣK, ...] of live patches -> [crops, full, ...] with zeros where patches were dropped."""
        history = self.history if arrangement is None else arrangement
        full = history.full[0]
        if history.short:
            out = values.new_zeros(len(history.full) * full, *values.shape[1:])
            values = out.index_copy_(0, history.places.to(out.device), values)
        return values.unflatten(0, (-1, full))


class PaddedTower(Tower):
    """See `Tower`. Frames of a video that are not chosen never enter the tower."""

    def _install(self, per_layer: dict[int, set[Fact]]) -> None:
        super()._install(per_layer)
        if self.stages and not self.encoder.takes_mask:
            for module in (module for _, layers in self.towers for module in layers[1:]):
                MaskedLayer(self.context.handle, module, self.encoder.attention)

    def _behind(self) -> None:
        self.proportional = any(stage.merge_point() == "proportional" for stage in self.stages)
        for _, layers in self.towers:
            MergeInLayer(self.run, self.context.handle, layers, self.merging, self._decide)
        if self.adapter.resampler is not None:
            self.context.handle.before(self.adapter.resampler, self._resampler)
        self.context.handle.after(self.adapter.projectors[0], self._projector)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        self.adapter.check_call(kwargs)
        given = args[0] if args else kwargs["pixel_values"]
        call = self.run.call
        if any(self.merging.values()) and (call is None or call.skip_reason is None):
            check_interpolated(call)
        pixels, chosen = given, None
        skipped: tuple[bool, ...] = ()
        if call is not None and (self.choosers or call.skip_plan is not None):
            pixels, chosen, skipped = self._choose(call, given)
        crops, unit, device = len(pixels), self.encoder.unit, pixels.device
        full = self.adapter.patches // unit
        each = (full,) * crops
        self.run.tower = state = PaddedState(
            history=TokenHistory(each, place_in_image(each, device)),
            batch=Batch((full * unit,) * crops, int(self.encoder.cls), device),
            chosen=chosen,
            skipped=skipped,
            skip_reason=None if call is None else call.skip_reason,
        )
        if self.choosers and call is not None and chosen is None:
            state.traces += frames.untouched(self.choosers, self.adapter.crops(call.arguments), full, unit)
        if self.pixels:
            size: Any = self.adapter.tower.config.patch_size
            behind = torch.nn.functional.unfold(pixels.float(), size, stride=size).transpose(1, 2)
            state.facts[Fact("pixels")] = self._of_tokens(behind)
        if pixels is given:
            return None
        return ((pixels, *args[1:]), kwargs) if args else (args, {**kwargs, "pixel_values": pixels})

    def _of_tokens(self, patches: Tensor) -> Tensor:
        """[crops, patches, C] row by row -> [crops, tokens, ...], the values of each visual token's patches."""
        return patches

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

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        state, e = self.state, self.encoder
        packed = state.batch.packed
        projected = {name: packed(value).unflatten(-1, (e.heads, -1)) for name, value in state.taps.items()}
        turn = None if state.bias is None else partial(biased, bias=packed(state.bias), scale=e.scale)
        return EncoderLayer(projected, [n + e.cls for n in state.batch.counts], e.scale, e.cls, turn=turn)

    def _per_token(self, value: Tensor) -> Tensor:
        """Without CLS tokens."""
        batch: Batch = self.state.batch
        if not batch.cls:
            return value
        if not batch.ragged:
            return value.unflatten(0, (len(batch.counts), -1))[:, 1:].flatten(0, 1)
        # Packed row of each live patch: its rank, plus one CLS row for every crop up to its own.
        rows = batch.at[0]
        return value[(torch.arange(1, 1 + len(rows), device=rows.device) + rows).to(value.device)]

    def _gather(self, hidden: Tensor) -> Tensor:
        return self.state.batch.patches(hidden)

    def _live(self, fact: Tensor) -> Tensor:
        return fact.flatten(0, 1)[self.state.history.places.to(fact.device)]

    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        side = math.isqrt(self.adapter.patches)
        return (((1, side, side),),) * len(self.state.history.full), None

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state, cls = self.state, int(self.encoder.cls)
        state.batch = batch = Batch(keep.lengths, cls, state.batch.device)
        size = state.history.size if self.proportional else None
        if size is not None:
            state.bias = batch.pad(size.log())
        return batch.pad(keep.apply(values), hidden[:, :1] if cls else None)

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Padded keys are masked."""
        flash = "flash" in (self.adapter.tower.config._attn_implementation or "")
        mask = self.state.batch.mask(hidden, flash, self.state.bias)
        return {} if mask is None else {"attention_mask": mask}

    def _resampler(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the model pools patches by their place, ahead of the projector: full shape again."""
        state = self.state
        if state is None:
            return None
        full = self._restore(args[0])
        state.pooled = True
        return None if full is None else ((full(args[0]), *args[1:]), kwargs)

    def _projector(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the projector: full shape again."""
        state = self.state
        if state is None or state.pooled:
            return None
        full = self._restore(args[0])
        return None if full is None else full(out)

    def _restore(self, features: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The function that gives values of the live patches [crops, P, C] their full shape, None where they have it;
        notes the features."""
        state, call = self.state, self.run.call
        # A model that makes a token of the CLS as well leaves it in front.
        lead = features.shape[1] - max(state.batch.counts)
        patches = replace(state.batch, cls=lead).patches
        if call is not None and state.history.full != tuple(layout.tokens for layout in call.layouts):
            move_to_visible_member(state, call, self.adapter.pack)
        if state.chosen is not None:
            frames.expand_to_all_frames(state, state.chosen, 1)
        short = state.short

        def full(x: Tensor) -> Tensor:
            return state.restore(patches(x)) if short else x[:, lead:]

        if self.features:
            state.facts[Fact("features")] = full(features).detach()
        if not (short and lead):
            return full if short else None

        def led(x: Tensor) -> Tensor:
            cls = x[:, :lead]
            return torch.cat([cls if state.chosen is None else frames.of_all_frames(cls, state.chosen), full(x)], 1)

        return led
