"""At every generated token a stage chooses which cached visual tokens are read; the cache stays whole.

Where the model's forward reads everything (several tokens at once, layers that the stage leaves alone, a budget that
is not exceeded) its own attention runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from vtoken.errors import UnsupportedError
from vtoken.hooks.decode.cached_images import CachedImages, GroupSlots
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.layer_kinds import other_kinds
from vtoken.hooks.state.live_tokens import trace_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.hooks.state.run import Clock
from vtoken.kernels import attend_slots
from vtoken.stages import Stage
from vtoken.stages.decode import Choice, DecodeStage, DecodeStep

NO_CACHE = "this call has no KV cache (use_cache=False) that a generated token could read"


class SlotChooser:
    """A tap on every decoder layer with attention, which also counts what is read where nothing is chosen."""

    def __init__(self, context: Context, stage: DecodeStage) -> None:
        self.run, self.stage, self.attending = context.run, stage, context.attending
        self.acting = frozenset(stage.layers(context.depth)) & frozenset(self.attending)
        tap(context.handle, context.lm, self.attending, self._tap)

    def check(self, cache: Any) -> None:
        """Refuses caches from whose tokens the stage cannot choose, at a prefill with images.

        Raises:
            UnsupportedError: says why, and what to do.
        """
        if cache is None:
            return
        name = self.stage.name
        if cache.is_compileable:
            raise UnsupportedError(
                f"stage {name} chooses among cached tokens at every step, whose number grows, and a static cache runs "
                "one step of fixed shapes: leave cache_implementation out"
            )
        if odd := other_kinds(cache, self.attending):
            raise UnsupportedError(
                f"stage {name} cannot choose from cache layers of kind {odd}; use a plain DynamicCache"
            )

    def finish(self, flow: PrefillState) -> None:
        """Notes which positions of the cache show an image, and what the stage does there; asks the device once per
        layer group."""
        cache = flow.cache
        if not isinstance(cache, PrunedCache):
            flow.skip(self.stage, flow.skip_reason or NO_CACHE)
            return
        entry = trace_of(self.stage, flow.live.lengths, flow.live.history, Clock(torch.device("cpu")), None)
        entry.clock = lambda: 0.0
        flow.trace.stages.append(entry)
        before: CachedImages | None = cache.images
        image, memory = numbered(flow, before), {} if before is None else before.memory
        cache.images = images = CachedImages(image, entry, memory=memory)
        groups = [images.group(cache, start, self.stage) for start in sorted(cache.groups)]
        # Rows that are read whole in all layers.
        asides = [None if None in row else row[0] for row in zip(*(g.asides for g in groups), strict=True)]
        entry.rows_aside = [flow.skipped.get(r, why) for r, why in enumerate(asides)]
        if None not in asides:
            longest = max(range(len(asides)), key=lambda r: (r in flow.live.row, flow.counts[r]))
            entry.stood_aside = flow.skip_reason or entry.rows_aside[longest]

    def _tap(self, call: AttentionCall) -> Any:
        cache, flow, layer = self.run.cache, self.run.flow, call.layer
        images: CachedImages | None = getattr(cache, "images", None)
        if images is None or isinstance(flow, PrefillState):
            return call.original()
        if call.q.shape[2] > 1:
            images.interrupt(layer)
            return call.original()
        if layer == self.attending[0]:
            images.begin()
        group, step, choice = images.group(cache, layer, self.stage), None, None
        if layer in self.acting and group.thins:
            reason = call.skip_reason()
            if reason is None:
                step = step_of(images, group, call, None if flow is None else flow.key_mask)
            else:
                images.entry.stood_aside = reason
        if step is not None:
            with torch.no_grad():
                choice = self.stage.choose(step)
            images.before = layer
        every = group.every(call.k.shape[2])
        if step is None or choice is None:
            images.count(every)
            return call.original()
        check(self.stage, choice, step)
        read = zip(every, group.lengths, choice.counts, strict=True)
        images.count([n - visual + chosen for n, visual, chosen in read])
        slots = slots_of(images, group, choice, call.k.shape[2], step.real)
        return attend_slots(step.queries, call.k, call.v, slots, call.scale)[:, None], None


def step_of(images: CachedImages, group: GroupSlots, call: AttentionCall, key_mask: Tensor | None) -> DecodeStep:
    """What a stage is given of a layer in a decode step. `key_mask` [B, S]: slots that are not masked; None: all."""
    return DecodeStep(
        call.q[:, :, 0],
        call.k,
        group.visual.to(call.k.device),
        group.lengths,
        group.budgets,
        None if key_mask is None else key_mask.bool().to(call.k.device),
        call.scale,
        call.layer,
        images.before,
        images.memory.setdefault(call.layer, {}),
        images.shared.setdefault("stage", {}),
    )


def numbered(flow: PrefillState, before: CachedImages | None) -> Tensor:
    """[B, logical] as `CachedImages.image`: images of earlier prefills, then those of this one."""
    image = torch.full(flow.new.shape, -1, dtype=torch.long, device=flow.new.device)
    shown, old = flow.started, image[:, :0] if before is None else before.image
    first = int(old.max()) + 1 if old.shape[1] else 0
    image = torch.cat([pad(old, (0, flow.past - old.shape[1]), value=-1), image], 1)
    image[shown.batch_row, flow.past + shown.column] = shown.image.to(image.device) + first
    if flow.skip_reason is not None:
        image[:, flow.past :] = -1
    for row in flow.skipped:
        image[row, flow.past :] = -1
    return image


def slots_of(images: CachedImages, group: GroupSlots, choice: Choice, slots: int, real: Tensor | None) -> Tensor:
    """[B, Hk, K] slots that are read, -1 for none: text, then all that came since the prompt, then what was chosen."""
    key = ("always", group.start)
    if key not in images.shared:
        tail = torch.arange(group.end, slots, device=group.text.device).expand(len(group.text), -1)
        images.shared[key] = _real(torch.cat([group.text, tail], 1), real)
    index = choice.index
    visual = group.visual.to(index.device)[:, None].expand(-1, index.shape[1], -1)
    chosen = visual.gather(2, index.clamp(min=0)).masked_fill(index < 0, -1)
    always = images.shared[key].to(index.device)[:, None].expand(-1, index.shape[1], -1)
    return torch.cat([always, _real(chosen, real)], 2)


def _real(index: Tensor, real: Tensor | None) -> Tensor:
    """Slots [B, ..., K] with -1 for those that are masked."""
    if real is None:
        return index
    found = real.to(index.device).gather(1, index.clamp(min=0).flatten(1)).view(index.shape)
    return index.masked_fill(~found, -1)


def check(stage: DecodeStage, choice: Choice, step: DecodeStep) -> None:
    """Refuses a decision that does not fit its step, from what the host knows.

    Raises:
        ValueError: names the stage.
    """
    rows, heads = step.keys.shape[:2]
    fits = len(choice.counts) == rows and all(0 <= k <= n for k, n in zip(choice.counts, step.lengths, strict=False))
    if not fits or tuple(choice.index.shape) != (rows, heads, max(choice.counts)):
        raise ValueError(
            f"stage {stage.name} chose {list(choice.counts)} of {list(step.lengths)} visual tokens per row, in an "
            f"index of {tuple(choice.index.shape)}; it must be {(rows, heads)} and the most that a row reads, 0 to all "
            "of them"
        )


def check_decode(stages: Sequence[Stage], lm: Any, attending: Sequence[int]) -> None:
    """Refuses stages that cannot choose from a KV cache, more than one that does, and a stage of site cache beside one.

    Raises:
        UnsupportedError: names the stages.
    """
    mine = [stage for stage in stages if stage.site == "decode"]
    for stage in mine:
        if not isinstance(stage, DecodeStage):
            raise UnsupportedError(
                f"stage {stage.name} acts at site 'decode' and has no choose(); derive it from "
                "vtoken.stages.DecodeStage"
            )
        if not set(stage.layers(len(lm.layers))) & set(attending):
            raise UnsupportedError(
                f"stage {stage.name} leaves all layers with attention as they are; of this decoder's "
                f"{len(lm.layers)} layers {list(attending)} have attention"
            )
    if len(mine) > 1:
        raise UnsupportedError(
            f"stages {' and '.join(s.name for s in mine)} both choose what a generated token reads; keep one of them"
        )
    for other in stages if mine else ():
        if other.site == "cache":
            raise UnsupportedError(
                f"stage {mine[0].name} chooses among visual tokens of the whole cache, of which {other.name} leaves "
                "every head others; keep one of the two"
            )
