"""What enters the language model: the images of a prefill, what the encoder dropped of them, and the facts about the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.forward_state import ForwardState, PrefillState
from vtoken.hooks.state.image_spans import HIDDEN, ImageSpans, check, locate
from vtoken.hooks.state.live_tokens import LiveTokens
from vtoken.hooks.state.prompt_text import answered, text_of
from vtoken.hooks.state.run import Run, TokenHistory, segments
from vtoken.hooks.state.trace import Trace
from vtoken.stages import Fact, Keep, Stage, image_of, offsets_of


class PrefillBuilder:
    """Turns a forward with visual positions into a `PrefillState`.

    Args:
        resolve: the fact as the encoder stored it (layers resolved, substituted).
        newline: which newline tokens stay, see Prefill.
        acts: whether the pipeline has any stage.
        min_tokens: visual tokens below which a row runs dense.
    """

    def __init__(
        self,
        adapter: Any,
        run: Run,
        resolve: Callable[[Fact], Fact],
        newline: str,
        *,
        acts: bool,
        min_tokens: int = 0,
    ) -> None:
        self.adapter, self.run, self.resolve, self.newline, self.acts = adapter, run, resolve, newline, acts
        self.min_tokens = min_tokens

    def start(
        self, flow: ForwardState, visual: Tensor, deepstack: Sequence[Tensor] | None
    ) -> tuple[PrefillState, Tensor]:
        """Finds the images of the batch, and drops what the encoder dropped; returns the values [ΣK, D] of the live tokens too."""
        each = [(visual == kind + 1).sum(1) for kind in range(len(self.adapter.placeholders))]
        answer = answered(visual, flow.new, self.run.tail, self.run.labels)
        behind = [] if answer is None else [answer.sum(1)]
        *told, shown, counts = torch.stack([*each, *behind, ((visual > 0) & flow.new).sum(1), flow.new.sum(1)]).tolist()
        held, tails = told[: len(each)], told[-1] if behind else [0] * len(counts)
        located = locate(visual, held, self.run.encodes, self.adapter)
        whole = unpruned(located)
        hidden = sum(shown) < sum(map(sum, held))
        seen = unmasked(whole, flow.new, self.adapter) if hidden else whole
        values = flow.hidden[whole.batch_row, whole.column]
        check(values, flow.positions if self.adapter.mrope else None, located, seen)
        trace = self.run.trace = Trace(
            visual_tokens=list(seen.lengths),
            parts=list(whole.parts),
            row=list(whole.row),
            stages=located.stages(),
            counted=next((encode.counted for encode in located.encodes if encode.counted), None),
        )
        prefill = PrefillState(
            **{**vars(flow), "counts": counts},
            live=seen,
            started=seen,
            raster=whole,
            trace=trace,
            spans=located,
            policy=self.newline,
            deepstack=list(deepstack or ()),
            labels=self.run.labels,
            answer=answer if any(tails) else None,
            tails=tails,
            texts=[n - tail - v for n, tail, v in zip(counts, tails, shown, strict=True)],
            min_tokens=self.min_tokens,
            project=self.project if self.adapter.encoder.unit == 1 else None,
        )
        trace.dense_rows = sorted(prefill.skipped)
        if hidden or any(encode.alive is not None for encode in located.encodes):
            values = entered(prefill, values)
        if located.newlines is not None and self.newline == "drop" and self.acts and prefill.skip_reason is None:
            prefill.leave(prefill.live)
        return prefill, values

    def project(self, features: Tensor) -> Tensor:
        """[M, D] of features [M, D_encoder]. By `forward`: the projector's hooks, vtoken's among them, are about whole pictures."""
        projector = self.adapter.projectors[0]
        device = next(projector.parameters()).device
        # Where accelerate offloads the projector, what it put around `forward` brings both together.
        here = features if device.type == "meta" else features.to(device)
        return projector.forward(here).to(features.device)

    def facts(self, flow: PrefillState, stage: Stage) -> dict[Fact, Any]:
        """What the stage asked for, about the live tokens."""
        return {
            need: text_of(flow, flow.hidden) if need.name == "text" else self.fact(flow, stage, need)
            for need in stage.needs()
        }

    def fact(self, flow: PrefillState, stage: Stage, need: Fact) -> Tensor:
        """A fact of the encoder about the live tokens, at any time of the prefill."""
        v, located, stored = flow.live, flow.spans, self.resolve(need)
        if not located.encodes or not all(stored in encode.facts for encode in located.encodes):
            raise UnsupportedError(
                f"stage {stage.name} needs {need.name}, but the features of this call were not encoded by this model in this "
                "thread; pass pixel_values instead of precomputed features"
            )
        full = located.gather([encode.facts[stored] for encode in located.encodes])
        live = offsets_of(v.history.full, v.image.device)[:-1][v.image] + v.history.raster_index
        return full[live.to(full.device)].to(flow.hidden.device)


def unpruned(located: ImageSpans) -> LiveTokens:
    """All visual tokens of the batch, newlines left out."""
    layouts, device = located.layouts, located.batch_row.device
    lengths = tuple(layout.tokens for layout in layouts)
    image, raster_index = image_of(lengths, device), torch.arange(sum(lengths), device=device)
    if len(lengths) > 1:
        raster_index = raster_index - offsets_of(lengths, device)[:-1][image]
    segment = segments(layouts)
    return LiveTokens(
        lengths,
        tuple(layout.parts for layout in layouts),
        located.row,
        located.batch_row,
        located.column,
        image,
        TokenHistory(lengths, raster_index, lengths),
        None if segment is None else segment.to(device, non_blocking=True),
        None if located.newlines is None else located.newlines.closed_by,
    )


def unmasked(whole: LiveTokens, new: Tensor, adapter: Any) -> LiveTokens:
    """The visual tokens that the padding mask `new` [B, L] does not hide. Asks the device.

    Raises:
        UnsupportedError: a part of a picture is hidden, of a model that numbers pictures by rows and columns.
    """
    shown = new[whole.batch_row, whole.column]
    counts = whole.image.new_zeros(len(whole.lengths)).index_add_(0, whole.image, shown.to(whole.image)).tolist()
    if adapter.mrope and any(0 < n < length for n, length in zip(counts, whole.lengths, strict=True)):
        raise UnsupportedError(HIDDEN)
    return whole.after(Keep(shown.nonzero()[:, 0], tuple(counts)))


def entered(flow: PrefillState, values: Tensor) -> Tensor:
    """Leaves out what the padding mask hides and what encoder stages dropped; returns the values that remain of [ΣN, D].

    Of merged tokens, DeepStack features from before the merge are averaged, equally weighted; later ones, of which only some tokens have any,
    are those of the token that absorbed them.
    """
    v, encodes = flow.raster, flow.spans.encodes
    gone = ~(
        mask_of(flow.spans, [encode.alive for encode in encodes]).to(v.image.device) & flow.new[v.batch_row, v.column]
    )
    counts = v.image.new_zeros(len(v.lengths)).index_add_(0, v.image, (~gone).to(v.image)).tolist()
    # As nonzero(), whose size the device would be asked for.
    alive = torch.argsort(gone, stable=True)[: sum(counts)]
    keep = Keep(alive, tuple(counts))
    left = v.after(keep)
    if any(encode.absorbed_by is not None for encode in encodes):
        flat = [torch.full((len(e.fingerprint),), -2) if e.absorbed_by is None else e.absorbed_by for e in encodes]
        absorbed_by = flow.spans.gather(flat).to(v.batch_row.device)
        alone = torch.where(gone, -1, v.history.raster_index)
        absorbed_by = torch.where(absorbed_by == -2, alone.to(absorbed_by.device), absorbed_by)
        slot = torch.full_like(absorbed_by, -1)
        slot[alive] = torch.arange(len(alive), device=alive.device)
        target = absorbed_by + offsets_of(v.lengths, absorbed_by.device)[:-1][v.image]
        into = slot[target.clamp(min=0)].masked_fill(absorbed_by < 0, -1)
        left = left.with_home(absorbed_by.masked_fill(into < 0, -1))
        keep = replace(keep, into=into)
    if left.lengths == v.lengths:
        return values
    flow.leave(left)
    for tap, features in enumerate(flow.deepstack):
        there = mask_of(flow.spans, [encode.deep[tap] if encode.deep else None for encode in encodes])
        flow.deepstack[tap] = without(keep, ~there).to(features.device).apply(features)
    return values[alive.to(values.device)]


def mask_of(located: ImageSpans, masks: Sequence[Tensor | None]) -> Tensor:
    """[ΣN] bool of one packed mask per encode, None for one that is True everywhere."""
    sizes = [len(encode.fingerprint) for encode in located.encodes]
    device = next((m.device for m in masks if m is not None), located.batch_row.device)
    whole = [
        torch.ones(n, dtype=torch.bool, device=device) if m is None else m for m, n in zip(masks, sizes, strict=True)
    ]
    return located.gather(whole)


def without(keep: Keep, gone: Tensor) -> Keep:
    """The decision when some of the tokens [ΣN] have no value to give."""
    return keep if keep.into is None else replace(keep, into=keep.into.masked_fill(gone.to(keep.into.device), -1))
