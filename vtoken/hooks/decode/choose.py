"""At every generated token a stage chooses which cached visual tokens are read; the cache stays whole.

Where the model's forward reads everything (several tokens at once, layers that the stage leaves alone, a budget that
is not exceeded) its own attention runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers.cache_utils import DynamicLayer

from vtoken.errors import UnsupportedError
from vtoken.hooks.attention.sparse_prefill import unusual
from vtoken.hooks.decode.cached_images import CachedImages, GroupSlots
from vtoken.hooks.decoder.attention_tap import tap
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
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
        """Refuses a prefill with images whose cache tokens cannot be chosen from.

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
        layers = [layer for k, layer in enumerate(cache.layers) if k in self.attending]
        if odd := {type(layer).__name__ for layer in layers if type(layer) is not DynamicLayer}:
            raise UnsupportedError(
                f"stage {name} cannot choose from cache layers of kind {', '.join(sorted(odd))}; use a plain "
                "DynamicCache"
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
        cache.images = held = CachedImages(image, entry, memory=memory)
        groups = [held.group(cache, start, self.stage) for start in sorted(cache.groups)]
        # Rows that are read whole in all layers.
        asides = [None if None in row else row[0] for row in zip(*(g.asides for g in groups), strict=True)]
        entry.rows_aside = [flow.skipped.get(r, why) for r, why in enumerate(asides)]
        if None not in asides:
            longest = max(range(len(asides)), key=lambda r: (r in flow.live.row, flow.counts[r]))
            entry.stood_aside = flow.skip_reason or entry.rows_aside[longest]

    def _tap(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        return self._attend(module, q, k, v, original, kwargs)

    @eager
    def _attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, original: Callable[..., Any], kwargs: dict[str, Any]
    ) -> Any:
        cache = self.run.cache
        held: CachedImages | None = getattr(cache, "images", None)
        if held is None or isinstance(self.run.flow, PrefillState):
            return original()
        layer, slots = module.layer_idx, k.shape[2]
        if q.shape[2] > 1:
            held.interrupt(layer)
            return original()
        if layer == self.attending[0]:
            held.begin()
        group = held.group(cache, layer, self.stage)
        choice = None
        if layer in self.acting and group.thins and self._plain(module, held, kwargs):
            scale = kwargs.get("scaling") or q.shape[-1] ** -0.5
            real = self._real()
            with torch.no_grad():
                choice = self._choice(held, group, q, k, real, scale, layer)
        if choice is None:
            held.count(group.every(slots))
            return original()
        read = zip(group.every(slots), group.lengths, choice.counts, strict=True)
        held.count([every - n + chosen for every, n, chosen in read])
        return attend_slots(q[:, :, 0], k, v, slots_of(held, group, choice, slots, real), scale)[:, None], None

    def _plain(self, module: Any, held: CachedImages, kwargs: dict[str, Any]) -> bool:
        """Whether a step's attention may be replaced; the trace tells why not."""
        if module.training or kwargs.get("dropout"):
            held.entry.stood_aside = "the model is in training mode"
        elif kwargs.get("output_attentions"):
            held.entry.stood_aside = "attention weights were asked for"
        elif found := unusual(module, kwargs):
            held.entry.stood_aside = f"this layer's attention is not plain causal attention ({found})"
        else:
            return True
        return False

    def _real(self) -> Tensor | None:
        """[B, S] which slots hold a token that is not masked; None: all do."""
        flow = self.run.flow
        return None if flow is None or flow.key_mask is None else flow.key_mask.bool()

    def _choice(
        self, held: CachedImages, group: GroupSlots, q: Tensor, k: Tensor, real: Tensor | None, scale: float, layer: int
    ) -> Choice | None:
        step = DecodeStep(
            q[:, :, 0],
            k,
            group.visual.to(k.device),
            group.lengths,
            group.budgets,
            None if real is None else real.to(k.device),
            scale,
            layer,
            held.before,
            held.memory.setdefault(layer, {}),
            held.shared.setdefault("stage", {}),
        )
        choice = self.stage.choose(step)
        held.before = layer
        if choice is not None:
            check(self.stage, choice, step)
        return choice


def numbered(flow: PrefillState, before: CachedImages | None) -> Tensor:
    """[B, logical] as `CachedImages.image`, with those of this prefill after what earlier ones left."""
    image = torch.full(flow.new.shape, -1, dtype=torch.long, device=flow.new.device)
    shown, first = flow.started, 0
    if before is not None:
        first = int(before.image.max()) + 1
        image = torch.cat([pad(before.image, (0, flow.past - before.image.shape[1]), value=-1), image], 1)
    else:
        image = pad(image, (flow.past, 0), value=-1)
    image[shown.batch_row, flow.past + shown.column] = shown.image.to(image.device) + first
    if flow.skip_reason is not None:
        image[:, flow.past :] = -1
    for row in flow.skipped:
        image[row, flow.past :] = -1
    return image


def slots_of(held: CachedImages, group: GroupSlots, choice: Choice, slots: int, real: Tensor | None) -> Tensor:
    """[B, Hk, K] slots that are read, -1 for none: what was chosen, and in front of it text and all that came since."""
    key = ("always", group.start)
    if key not in held.shared:
        tail = torch.arange(group.end, slots, device=group.text.device).expand(len(group.text), -1)
        held.shared[key] = _real(torch.cat([group.text, tail], 1), real)
    index = choice.index
    visual = group.visual.to(index.device)[:, None].expand(-1, index.shape[1], -1)
    chosen = visual.gather(2, index.clamp(min=0)).masked_fill(index < 0, -1)
    always = held.shared[key].to(index.device)[:, None].expand(-1, index.shape[1], -1)
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
            f"stage {stage.name} chose {list(choice.counts)} of {list(step.lengths)} visual tokens per row, in an index "
            f"of {tuple(choice.index.shape)}; it must be {(rows, heads)} and the most that a row reads, 0 to all of them"
        )


def check_decode(stages: Sequence[Stage], lm: Any, attending: Sequence[int]) -> None:
    """Refuses stages that cannot choose from a KV cache, more than one that does, and caches whose visual tokens cannot
    be told.

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
