"""Inside a packed vision tower whose sequence holds every image row by row, while a mask keeps images apart (Pixtral).

The patches of a token (a square, or one patch) do not follow each other there. As soon as anything is dropped the
sequence is what is left, token by token: attention within an image does not depend on the order, and rotary embeddings
go with their patches. A projector that joins patches to tokens by their places is given one picture that is a single
token wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import unfold

from vtoken.hooks.state.run import ImageLayout
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.vision.encoder_facts import EncoderLayer
from vtoken.hooks.vision.tower import Tower
from vtoken.hooks.vision.varlen_tower import VarlenState, VarlenTower
from vtoken.stages import Fact, Keep, image_of, offsets_of, place_in_image


@dataclass(kw_only=True)
class RowsState(VarlenState):
    """State of one tower call; live tokens lie in reading order.

    Attributes:
        patches: [unit*N] place in the whole sequence of each patch, token by token.
        cut: whether the sequence holds only what a decision left, token by token.
        bounds: for `GridsTower` only; mask: [1, 1, P, P] of the live patches, None where all attend to all.
    """

    patches: Tensor
    cut: bool = False
    mask: Tensor | None = None


def token_by_token(layouts: Sequence[ImageLayout], side: int) -> Tensor:
    """[unit*N] places, in a sequence of all images row by row, of the side x side patches of each token."""
    found, start = [], 0
    for layout in layouts:
        ((_, rows, columns),) = layout.parts
        places = torch.arange(start, start + rows * columns * side**2)
        found.append(places.view(rows, side, columns, side).transpose(1, 2).flatten())
        start += len(places)
    return torch.cat(found)


class RowsTower(VarlenTower):
    """See `Tower`."""

    @property
    def side(self) -> int:
        """Patches along an edge of a token."""
        return math.isqrt(self.encoder.unit)

    def _groups(self, patches: Tensor) -> Tensor:
        if self.encoder.unit > 1 and not self.state.cut:
            patches = patches[self.state.patches.to(patches.device)]
        return super()._groups(patches)

    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.adapter.check_call(kwargs)
        pixels, call = args[0] if args else kwargs["pixel_values"], self.run.call
        given = {"pixel_values": pixels, "image_sizes": kwargs["image_sizes"]}
        layouts = self.adapter.layouts("image", given) if call is None else call.layouts
        self._enter(layouts, pixels.device)
        if self.pixels:
            size: int = self.adapter.tower.config.patch_size
            whole = [
                unfold(image[None, :, : r * self.side * size, : c * self.side * size].float(), size, stride=size)[0].T
                for image, layout in zip(pixels.detach(), layouts, strict=True)
                for _, r, c in layout.parts
            ]
            self.state.facts[Fact("pixels")] = self._groups(torch.cat(whole)).flatten(1)

    def _enter(self, layouts: Sequence[ImageLayout], device: torch.device) -> None:
        """Makes the state of a call with these images."""
        call, full = self.run.call, tuple(layout.tokens for layout in layouts)
        live = torch.arange(sum(full), device=device)
        self.run.tower = state = RowsState(
            history=TokenHistory(full, place_in_image(full, device), full),
            layouts=tuple(layouts),
            image=image_of(full, device),
            slot=live,
            live=live,
            patches=token_by_token(layouts, self.side).to(device, non_blocking=True),
        )
        if call is not None:
            state.skipped, state.skip_reason = call.skipped([1] * len(layouts)), call.skip_reason

    def _tap(self, module: Any, letters: list[str]) -> nn.Module:
        return Tower._tap(self, module, letters)

    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        state, e = self.state, self.encoder
        projected = {name: value.flatten(0, -2).unflatten(-1, (e.heads, -1)) for name, value in state.taps.items()}
        cos, sin = kwargs["position_embeddings"]

        def turn(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
            return turned(q, cos.to(q.device), sin.to(q.device)), turned(k, cos.to(k.device), sin.to(k.device))

        return EncoderLayer(projected, [n * e.unit for n in state.history.counts], e.scale, cls=False, turn=turn)

    def _entering(self, layer: int, hidden: Tensor) -> Tensor:
        return hidden

    def _in_order(self, values: Tensor) -> Tensor:
        return values

    def _gather(self, hidden: Tensor) -> Tensor:
        return self._groups(hidden.flatten(0, -2))

    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        state = self.state
        state.live, state.cut, state.rotary = state.live[keep.index.to(state.live.device)], True, None
        return keep.apply(values).reshape(*hidden.shape[:-2], -1, hidden.shape[-1])

    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        state = self.state
        if not state.cut:
            return {}
        flash = "flash" in (self.adapter.tower.config._attn_implementation or "")
        if state.rotary is None:
            rows = super()._groups(state.patches)[state.live].flatten()
            state.rotary = tuple(half[rows.to(half.device)] for half in kwargs["position_embeddings"])
            state.mask = None if flash else self._mask(hidden)
        found = {"position_embeddings": state.rotary, "attention_mask": state.mask}
        if not flash:
            return found
        lengths = [n * self.encoder.unit for n in state.history.counts if n]
        bounds = offsets_of(lengths, hidden.device).int()
        found |= {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds}
        return {**found, "max_length_q": max(lengths), "max_length_k": max(lengths)}

    def _mask(self, hidden: Tensor) -> Tensor | None:
        """[1, 1, P, P], 0 within an image, the dtype's minimum elsewhere; None where there is only one image."""
        state = self.state
        if len(state.layouts) == 1:
            return None
        image = state.image[state.live].repeat_interleave(self.encoder.unit).to(hidden.device)
        apart = image[:, None] != image
        return hidden.new_zeros(apart.shape).masked_fill_(apart, torch.finfo(hidden.dtype).min)[None, None]

    def _behind(self) -> None:
        self.context.handle.before(self.adapter.projectors[0], self._joining)
        self.context.handle.after(self.adapter.projectors[0], self._joined)

    def _joining(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the projector."""
        state, unit = self.state, self.encoder.unit
        if state is None:
            return None
        if self.features:
            rows = args[0].detach().flatten(0, -2)
            state.facts[Fact("features")] = state.restore(self._groups(rows).mean(1))
        if unit == 1 or not state.cut:
            return None
        return (args[0], self._one_wide(args[1]), *args[2:]), kwargs

    def _one_wide(self, sizes: Any) -> Any:
        """Sizes for the projector in place of its own: one picture, one token wide, of all that is left."""
        edge = self.side * self.adapter.tower.config.patch_size
        return [(len(self.state.live) * edge, edge)]

    def _joined(self, module: nn.Module, args: tuple, kwargs: dict, out: Tensor) -> Tensor | None:
        """After the projector: full length again."""
        state = self.state
        if state is None or not state.cut:
            return None
        return state.restore(out.flatten(0, -2)).view(*out.shape[:-2], -1, out.shape[-1])


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [P, H, d] rotated by the rotary embedding of its patches, cos and sin [P, d]."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]
