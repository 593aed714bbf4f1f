"""Inside a padded tower whose crops have sizes of their own (NaFlex): rows of a batch, padded on the right to a common
length, with a mask.

Patches lie row by row, and squares of them become tokens in the projector, which is called crop by crop. As soon as
anything is dropped a crop's row is what is left of it, token by token, no longer than that of the fullest crop. Behind
the layers the rows get their shape back; the projector is given a crop that is one token high, of what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision.encoder_facts import EncoderLayer
from vtoken.hooks.vision.padded_tower import Batch
from vtoken.hooks.vision.rows_tower import RowsState, RowsTower, token_by_token
from vtoken.stages import Fact, Keep, Parts, image_of, place_in_image, size_of, uploaded

T = TypeVar("T")


@dataclass(kw_only=True)
class SizedState(RowsState):
    """State of one tower call. Until the layers are done every crop is an image of its own.

    Attributes:
        crops: rasters of the crops; given, batch: how all patches, and the live ones, lie in the padded batch.
        projected: how many crops the projector has been called for.
    """

    crops: Parts
    given: Batch
    batch: Batch
    projected: int = 0

    def left(self) -> tuple[Tensor, Tensor]:
        """Of the crop that is projected next: its live tokens [K], and the places [K, unit] of their patches in it,
        row by row."""
        at, patches = self.projected, self.patches.view(len(self.slot), -1)
        unit = patches.shape[1]
        start = sum(self.batch.counts[:at]) // unit
        live, before = self.live[start : start + self.batch.counts[at] // unit], sum(self.given.counts[:at])
        return live - before // unit, patches[live] - before


class SizedTower(RowsTower):
    """See `Tower`."""

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        pixels, call = args[0] if args else kwargs["pixel_values"], self.run.call
        given = {**kwargs, "pixel_values": pixels}
        layouts = self.adapter.layouts("image", given) if call is None else call.layouts
        device, crops = pixels.device, tuple(crop for layout in layouts for crop in layout.parts)
        full = tuple(size_of((crop,)) for crop in crops)
        live = torch.arange(sum(full), device=device)
        batch = Batch(tuple(n * self.encoder.unit for n in full), 0, device, pixels.shape[1])
        self.run.tower = state = SizedState(
            history=TokenHistory(full, place_in_image(full, device), full),
            layouts=layouts,
            image=image_of(full, device),
            slot=live,
            live=live,
            patches=token_by_token([ImageLayout((crop,)) for crop in crops], self.side).to(device, non_blocking=True),
            crops=crops,
            given=batch,
            batch=batch,
        )
        if call is not None:
            state.skipped = call.skipped([len(layout.parts) for layout in layouts])
            state.skip_reason = call.skip_reason
        if self.pixels:
            state.facts[Fact("pixels")] = self._groups(batch.patches(pixels.detach().float())).flatten(1)

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        batch, e = self.state.batch, self.encoder
        projected = {name: batch.packed(x).unflatten(-1, (e.heads, -1)) for name, x in self.state.taps.items()}
        return EncoderLayer(projected, batch.counts, e.scale, cls=False)

    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        return tuple((crop,) for crop in self.state.crops), None

    def _gather(self, hidden: Tensor) -> Tensor:
        return self._groups(self.state.batch.patches(hidden))

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state = self.state
        state.live, state.cut = state.live[keep.index.to(state.live.device)], True
        state.batch = Batch(tuple(n * self.encoder.unit for n in keep.lengths), 0, state.batch.device)
        return state.batch.pad(keep.apply(values).flatten(0, 1))

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Padded keys are masked."""
        return {"attention_mask": self.state.batch.mask(hidden)} if self.state.cut else {}

    def _behind(self) -> None:
        handle, projector = self.context.handle, self.adapter.projectors[0]
        handle.after(self.adapter.stack, self._whole)
        handle.after(self.adapter.tower, self._note_encoded)
        handle.before(projector, self._joining)
        handle.after(projector, self._joined)

    def _whole(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        """After the last layer: full shape again, row by row."""
        state = self.state
        if state is None or not state.cut:
            return None
        groups = state.restore(self._gather(out.last_hidden_state)).flatten(0, 1)
        rows = torch.empty_like(groups)
        rows[state.patches.to(rows.device)] = groups
        out.last_hidden_state = state.given.pad(rows)
        return out

    @torch.no_grad()
    def _note_encoded(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
        """After the tower: notes features, and brings history and traces from crops to pictures."""
        state = self.state
        if state is None:
            return
        if self.features:
            rows = state.given.patches(out.last_hidden_state.detach())
            units = rows[state.patches.to(rows.device)].unflatten(0, (-1, self.encoder.unit))
            state.facts[Fact("features")] = state.restore(units[state.live.to(rows.device)].mean(1))
        crops = [len(layout.parts) for layout in state.layouts]
        if max(crops) > 1:
            state.history = of_pictures(state.history, crops)
            full = [size_of((crop,)) for crop in state.crops]
            state.traces = [trace_of_pictures(trace, full, crops) for trace in state.traces]

    def _joining(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the projector, which is given a crop [1, rows, columns, C]: what is left of it, one token high."""
        state = self.state
        if state is None or not state.cut:
            return None
        rows = args[0].flatten(0, 2)
        places = state.left()[1].unflatten(1, (self.side, self.side)).transpose(0, 1).flatten(1)
        return (rows[places.to(rows.device)][None], *args[1:]), kwargs

    def _joined(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After it: [1, rows, columns, D] again, zeros where tokens were dropped."""
        state = self.state
        if state is None or not state.cut:
            return None
        _, rows, columns = state.crops[state.projected]
        whole = out.new_zeros(rows * columns, out.shape[-1])
        whole[state.left()[0].to(out.device)] = out.flatten(0, 2)
        state.projected += 1
        return whole.view(1, rows, columns, -1)


def starts_of(lengths: Sequence[int]) -> list[int]:
    return [0, *accumulate(lengths)][:-1]


def of_pictures(history: TokenHistory, crops: Sequence[int]) -> TokenHistory:
    """The history of crops as one of pictures, which have so many `crops` each."""
    device = history.raster_index.device
    start = uploaded([n for full in grouped(history.full, crops) for n in starts_of(full)], device)
    return replace(
        history,
        full=tuple(map(sum, grouped(history.full, crops))),
        raster_index=history.raster_index + start[image_of(history.counts, device)],
        lengths=tuple(map(sum, grouped(history.counts, crops))),
    )


def trace_of_pictures(trace: StageTrace, full: Sequence[int], crops: Sequence[int]) -> StageTrace:
    """The same for an entry of the trace; `full`: tokens of each crop."""
    start = [n for each in grouped(full, crops) for n in starts_of(each)]

    def kept() -> list[Tensor]:
        moved = [index + s for index, s in zip(trace.kept, start, strict=True)]
        return [torch.cat(each) for each in grouped(moved, crops)]

    def into() -> list[Tensor] | None:
        if trace.into is None:
            return None
        moved = [torch.where(index < 0, -1, index + s) for index, s in zip(trace.into, start, strict=True)]
        return [torch.cat(each) for each in grouped(moved, crops)]

    fields: dict[str, Any] = {"kept": kept, "into": into}
    fields |= {name: [*map(sum, grouped(getattr(trace, name), crops))] for name in ("tokens_in", "tokens_out")}
    return replace(trace, **fields)


def grouped(values: Sequence[T], sizes: Sequence[int]) -> list[list[T]]:
    """Splits values into runs of these sizes."""
    return [list(values[end - n : end]) for n, end in zip(sizes, accumulate(sizes), strict=True)]
