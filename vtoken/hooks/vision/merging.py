"""Merging between attention and MLP of a padded tower's layers.

The second norm is handed the merged tokens, so the MLP runs on fewer. Its output is set aside, the layer adds zeros
to a residual that is still long, and the merged tokens plus the output set aside take the place of what the layer
returns, before other hooks read it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.run import FeatureCall, Run
from vtoken.stages import Stage, image_of

Decide = Callable[[Stage, int, Tensor], Tensor]


class MergeInLayer:
    """Hooks that let stages merge inside layers.

    Args:
        layers: of the tower.
        acting: layer -> stages that merge in it.
        decide: lets a stage decide at a layer; takes and returns the padded batch [crops, P, D].
    """

    def __init__(
        self, run: Run, handle: Handle, layers: Sequence[Any], acting: Mapping[int, Sequence[Stage]], decide: Decide
    ) -> None:
        self.run, self.acting, self.decide = run, acting, decide
        for layer, module in enumerate(layers):
            if acting[layer]:
                handle.before(module.layer_norm2, partial(self._merge, layer, module))
                handle.after(module.mlp, self._aside)
                handle.after(module, self._add, first=True)

    def _merge(self, layer: int, owner: nn.Module, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        if owner.training and getattr(owner, "gradient_checkpointing", False):
            raise UnsupportedError(
                "gradient checkpointing runs vision layers again in the backward pass, when what was merged in them is "
                "forgotten; call model.gradient_checkpointing_disable(), or freeze the vision tower in evaluation mode "
                "(tower.eval())"
            )
        long = merged = args[0]
        for stage in self.acting[layer]:
            merged = self.decide(stage, layer, merged)
        self.run.tower.merged = None if merged is long else merged
        return None if merged is long else ((merged, *args[1:]), kwargs)

    def _aside(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        tower = self.run.tower
        if tower.merged is None:
            return None
        tower.merged = tower.merged + out
        if tower.nothing is None:
            tower.nothing = out.new_zeros(1, 1, 1)
        return tower.nothing

    def _add(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        tower = self.run.tower
        merged, tower.merged = tower.merged, None
        return None if merged is None else merged


def check_interpolated(call: FeatureCall | None) -> None:
    """Refuses to merge where the model interpolates features afterwards.

    Raises:
        UnsupportedError: an interpolated token needs several neighbours, most of which stand empty once patches were
            merged.
    """
    if call is not None and any(layout.interpolated for layout in call.layouts):
        raise UnsupportedError(
            "this model shrinks the features of videos and of pictures with many crops by interpolation after its "
            "vision tower, which merged patches do not survive; merge after it, with a stage of site tokens, or give "
            "it smaller pictures"
        )


def move_to_visible_member(tower: Any, call: FeatureCall, pack: Callable[[FeatureCall, Tensor], Tensor]) -> None:
    """Moves merged tokens whose place the model will cut off (padding of crops) to their first member that it keeps;
    facts and traces go with them. `pack` brings patches [crops, full, 1] to the tokens [ΣN, 1] that the model makes of
    them."""
    history = tower.history
    if history.absorbed_by is None or any(layout.interpolated for layout in call.layouts):
        return
    ids = torch.arange(sum(history.full), device=history.absorbed_by.device)
    packed = pack(call, ids.float().view(len(history.full), -1, 1))
    visible = torch.isin(ids, packed.long()).view(len(history.full), -1)

    def moves(into: Tensor) -> Tensor:
        """[crops, full] where each place moves to; into: [crops, full] the place that absorbed each, or -1."""
        full = into.shape[1]
        raster_index = torch.arange(full, device=into.device).expand_as(into)
        member = torch.where(visible & (into >= 0), raster_index, full)
        first = torch.full_like(into, full).scatter_reduce_(1, into.clamp(min=0), member, "amin")
        return torch.where(visible | (first == full), raster_index, first)

    absorbed_by = history.absorbed_by.view_as(visible)
    to = moves(absorbed_by)
    crop = image_of(history.counts, to.device)
    raster_index = to[crop, history.raster_index]
    for fact, values in tower.facts.items():
        rows, before, after = (index.to(values.device) for index in (crop, history.raster_index, raster_index))
        moved = values.clone()
        moved[rows, after] = values[rows, before]
        tower.facts[fact] = moved
    tower.history = replace(history, raster_index=raster_index)
    for number, trace in enumerate(tower.traces):
        if trace.into is not None:
            to = moves(torch.stack(trace.into))
            kept = [row[k].sort().values for row, k in zip(to, trace.kept, strict=True)]
            tower.traces[number] = replace(trace, kept=kept, into=list(followed(torch.stack(trace.into), to)))


def followed(into: Tensor, to: Tensor) -> Tensor:
    """`into` [crops, full] after places moved to `to` [crops, full]; -1 stays."""
    return torch.where(into >= 0, to.gather(1, into.clamp(min=0)), -1)
