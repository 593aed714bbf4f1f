"""Inside a padded tower after which the model joins squares of k x k neighbouring patches to visual tokens (pixel
shuffle, pooling).

Stages see such units, and whole ones leave. Until then patches lie row by row, as the tower has them; afterwards unit
by unit, which is the same to its layers. The tower's output gets its full length back, with zeros where patches were
dropped, because the model joins them by their places. A projector that is given units computes only those that
are left.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.vision import frames
from vtoken.hooks.vision.merging import move_to_visible_member
from vtoken.hooks.vision.padded_tower import Batch, PaddedTower
from vtoken.stages import Fact, Keep, Parts


def members(patches: int, unit: int, device: torch.device) -> Tensor:
    """[patches / unit, unit] which patches of a square crop make up each unit, both row by row."""
    side, k = math.isqrt(patches), math.isqrt(unit)
    rows = torch.arange(patches, device=device).view(side // k, k, side // k, k)
    return rows.transpose(1, 2).reshape(-1, unit)


class UnitTower(PaddedTower):
    """See `PaddedTower`. `Encoder.unit` patches make a visual token."""

    def _behind(self) -> None:
        handle, projector = self.context.handle, self.adapter.projectors[0]
        for tower, _ in self.towers:
            handle.after(tower, self._whole)
        handle.before(projector, self._to_project)
        handle.after(projector, self._projector)

    def _of_tokens(self, patches: Tensor) -> Tensor:
        return self._joined(patches).flatten(2)

    def _joined(self, patches: Tensor) -> Tensor:
        """[crops, patches, ...] row by row -> [crops, units, unit, ...]."""
        return patches[:, members(self.adapter.patches, self.encoder.unit, patches.device)]

    def _units(self, live: Tensor) -> Tensor:
        """[ΣP, ...] of live patches as the tower holds them -> [ΣK, unit, ...]."""
        if self.state.by_unit:
            return live.unflatten(0, (-1, self.encoder.unit))
        return self._joined(live.unflatten(0, (-1, self.adapter.patches))).flatten(0, 1)

    def _per_token(self, value: Tensor) -> Tensor:
        return self._units(super()._per_token(value)).mean(1)

    def _gather(self, hidden: Tensor) -> Tensor:
        return self._units(super()._gather(hidden))

    def _seen(self, values: Tensor) -> Tensor:
        return values.mean(1)

    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        side = math.isqrt(self.adapter.patches // self.encoder.unit)
        return (((1, side, side),),) * len(self.state.history.full), None

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state, cls = self.state, int(self.encoder.cls)
        state.batch = Batch(tuple(n * self.encoder.unit for n in keep.lengths), cls, state.batch.device)
        state.by_unit = True
        return state.batch.pad(keep.apply(values).flatten(0, 1), hidden[:, :1] if cls else None)

    def _whole(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        """Behind the tower: full shape again, row by row."""
        state = self.state
        if state is None or not state.by_unit:
            return None
        if isinstance(out, tuple):
            return (self._row_by_row(out[0]), *out[1:])
        out.last_hidden_state = self._row_by_row(out.last_hidden_state)
        hidden = out.get("hidden_states")
        if hidden is not None:
            # Entry h is the output of layer h - 1; those before the last that features come from are as they were.
            read = {layer + 1 for layer in self.encoder.feature_layers}
            out.hidden_states = tuple(
                self._row_by_row(x) if h in read and x is not None else x for h, x in enumerate(hidden)
            )
        return out

    def _row_by_row(self, hidden: Tensor) -> Tensor:
        """[crops, P, D] of what is left -> [crops, CLS and all patches, D]."""
        state, e = self.state, self.encoder
        place = members(self.adapter.patches, e.unit, hidden.device).flatten().argsort()
        whole = state.restore(super()._gather(hidden).unflatten(0, (-1, e.unit))).flatten(1, 2)[:, place]
        return torch.cat([hidden[:, :1], whole], 1) if e.cls else whole

    def _to_project(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the projector, which is given units [crops, units, unit * D], or patches [crops, patches, D] that it
        joins itself."""
        state, given = self.state, args[0]
        if state is None:
            return None
        joined = given.shape[1] != self.adapter.patches
        if self.features:
            units = given.unflatten(-1, (self.encoder.unit, -1)) if joined else self._joined(given)
            state.facts[Fact("features")] = units.mean(2).detach()
        if not (joined and state.short):
            return None
        return (given.flatten(0, 1)[state.history.places.to(given.device)][None], *args[1:]), kwargs

    def _projector(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the projector: [crops, units, D] again, zeros where units were dropped."""
        state, call = self.state, self.run.call
        if state is None:
            return None
        live = out.flatten(0, 1)
        if state.short and len(live) == sum(state.history.full):
            live = live[state.history.places.to(live.device)]
        if call is not None and state.history.full != tuple(layout.tokens for layout in call.layouts):
            move_to_visible_member(state, call, self.adapter.pack)
        if state.chosen is not None:
            frames.expand_to_all_frames(state, state.chosen, self.encoder.unit)
        return state.restore(live) if state.short else None
