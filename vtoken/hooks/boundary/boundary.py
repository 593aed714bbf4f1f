"""The language-model boundary: everything that enters the decoder is shortened here, coherently.

Features were merged into the prompt by the model itself, so ids and placeholders no longer matter. Embeddings,
positions and masks are cut to the live tokens and rows packed to the left-padded maximum of the batch; afterwards
outputs get their length back (zeros where tokens were dropped, see outputs.py), so that logits and labels keep their
shape.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.errors import UnsupportedError
from vtoken.hooks.attention.unmerge import Unmerge
from vtoken.hooks.boundary.calls import check_labels, check_packed, checked_cache
from vtoken.hooks.boundary.forward import forward_of, lagging
from vtoken.hooks.boundary.outputs import restore
from vtoken.hooks.boundary.prefill_start import build_prefill
from vtoken.hooks.cache.clear import clear_earlier
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.decode.choose import SlotChooser
from vtoken.hooks.state.cache_argument import CACHE, FORMER
from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.encoder_fact import encoder_fact, substituted
from vtoken.hooks.state.forward_state import ForwardState, StaticStep, eager
from vtoken.hooks.state.layer_kinds import SLIDING, kinds_of, layer_masks
from vtoken.hooks.state.left_padding import take
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_text import text_of
from vtoken.hooks.state.pruned_cache import PrunedCache, adopt, cache_bytes
from vtoken.hooks.state.run import UNSEEN, Clock
from vtoken.hooks.state.trace import StageTrace, Trace
from vtoken.stages import Fact, Stage
from vtoken.stages.facts import encoded, of_target


class Boundary:
    """Hooks on the language model.

    Args:
        unmerge: lets attention see merged tokens at all their places, if a stage asks for that.
        cache: shrinks the cache; chooser: chooses what a generated token reads of it.
    """

    def __init__(
        self,
        context: Context,
        *,
        unmerge: Unmerge | None = None,
        cache: CacheShrinker | None = None,
        chooser: SlotChooser | None = None,
    ) -> None:
        self.context, self.adapter, self.run, self.lm = context, context.adapter, context.run, context.lm
        self.stages = [(stage, substituted(stage, self.adapter.substitutes)) for stage in context.at("tokens")]
        # Later stages shorten inside the decoder, so every prefill with images takes over its cache.
        self.always = bool(context.at("decoder", "cache", "decode") or context.steering)
        self.unmerge, self.shrinker, self.chooser, self.switch = unmerge, cache, chooser, context.handle.switch
        self.taps_steps = chooser is not None or bool(context.steering) or (cache is not None and cache.goes_on)
        backend = self.lm.config._attn_implementation or ""
        self.slides = SLIDING in kinds_of(self.lm.config)
        self.maskless = (backend == "sdpa" or "flash" in backend) and not self.slides
        self.last: Trace | None = None
        context.handle.before(self.lm, self._before)
        context.handle.after(self.lm, self._after)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        # An exception in an earlier forward may have left its state behind.
        self.run.flow = self.run.cache = None
        if CACHE not in kwargs and FORMER in kwargs:
            kwargs = {CACHE: kwargs[FORMER], **{k: v for k, v in kwargs.items() if k != FORMER}}
        cache = kwargs.get(CACHE)
        if self.adapter.masks_outside:
            kwargs = self._unmade(kwargs, cache)
        mask = kwargs.get("attention_mask")
        if isinstance(cache, PrunedCache) and mask is None and self._stock(cache, kwargs["inputs_embeds"]):
            cache.busy = False  # left behind by a forward that failed
            return None
        first = cache is None or (not cache.is_compileable and not cache.get_seq_length())
        if first or kwargs["inputs_embeds"].shape[1] > 1:
            return self._several(args, kwargs)
        return self._continue(args, kwargs) if isinstance(cache, PrunedCache) else None

    def _unmade(self, kwargs: dict, cache: Any) -> dict:
        """The arguments with the 2D mask (over logical columns) from which the model made its own masks; unchanged with
        a static cache."""
        made, given = kwargs.get("attention_mask"), self.run.mask
        if (cache is not None and cache.is_compileable) or not isinstance(made, dict) or isinstance(given, dict):
            return kwargs
        return {**kwargs, "attention_mask": given}

    @eager
    def _several(self, args: tuple, kwargs: dict) -> Any:
        self.switch.off()
        x, cache, run = kwargs["inputs_embeds"], kwargs.get(CACHE), self.run
        visual, run.kinds = run.kinds, None
        if visual is not None and visual.shape == x.shape[:2]:
            return self._prefill(args, kwargs, visual.to(x.device))
        if isinstance(cache, PrunedCache):
            return self._continue(args, kwargs)
        if cache is None or not int(cache.get_seq_length()):
            run.trace = self.last = Trace(
                stages=[
                    StageTrace(s.name, s.site, [], [], [], stood_aside=UNSEEN)
                    for s in self.context.stages
                    if run.unseen
                ]
            )
        return None

    def _prefill(self, args: tuple, kwargs: dict, kinds: Tensor) -> Any:
        if self.context.stages:
            check_packed(kwargs, self.lm.config)
        clock = Clock(kinds.device)
        began = clock.now()
        flow, values = build_prefill(
            self.context, forward_of(self.context, kwargs), kinds, kwargs.get("deepstack_visual_embeds")
        )
        self.last, flow.began = flow.trace, (clock, began)
        for stage, given in self.stages:
            facts = self._facts(flow, stage) if flow.skip_reason is None else {}
            values = flow.decide(stage, values, facts, substitutes=given)
        flow.trace.layers = [list(flow.live.lengths)] * self.context.depth
        flow.trace.prompt_tokens = list(flow.counts)
        self._begin(flow, flow.cache)
        acts = flow.changed or (self.always and flow.skip_reason is None)
        new = self._shortened(flow, values, kwargs) if acts or isinstance(flow.cache, PrunedCache) else None
        if self.unmerge is not None:
            self.unmerge.prefill(flow)
        return None if new is None else (args, {**kwargs, **new})

    def _facts(self, flow: PrefillState, stage: Stage) -> dict[Fact, Any]:
        """The facts that the stage asked for, about the live tokens."""
        return {need: self._fact(flow, stage, need) for need in stage.needs()}

    def _fact(self, flow: PrefillState, stage: Stage, need: Fact) -> Any:
        if encoded(need, stage.site):
            return encoder_fact(self.context, flow, stage, need)
        if self.context.target is not None and of_target(need, stage.site):
            return self.context.target.about(flow, need)
        return text_of(flow, flow.hidden)

    def _shortened(self, flow: PrefillState, values: Tensor, kwargs: dict) -> dict[str, Any]:
        """New arguments of the language model: `values` [ΣK, D] of the live visual tokens and the rest of the prompt,
        packed to the left."""
        x = flow.hidden
        cache = checked_cache(self.context, flow, kwargs.get("use_cache"), (self.shrinker, self.chooser))
        if flow.live.history.slot is not None:
            x = x.clone()
            x[flow.live.batch_row, flow.live.column] = values.to(x.dtype)
        flow.relayout()
        flow.hidden = take(x, flow.index, 1)
        if not flow.dense:
            flow.hidden = flow.hidden.masked_fill(~flow.valid[..., None], 0)
        mask: Any = flow.enter(0)
        self._begin(flow, cache)
        flow.note_layout(0)
        if flow.blocks is not None or (self.slides and mask is not None):
            mask = layer_masks(self.lm.config, flow.hidden, mask, flow.cache, flow.slot_blocks())
        if cache is not None and cache.is_compileable:
            cache.prompt_mask = flow.mask if flow.past or not flow.unpadded else None
        if cache is None and mask is None:
            # Gaps in position ids without mask and cache would be taken for packed sequences.
            mask = torch.ones(flow.index.shape, dtype=torch.long, device=x.device)
        new = {
            "inputs_embeds": flow.hidden,
            "position_ids": flow.compact(0) if self.context.compact else take(flow.positions, flow.index, -1),
            "attention_mask": mask,
            CACHE: cache,
        }
        deep = kwargs.get("visual_pos_masks")
        if deep is None:
            return new
        shown = take(deep, flow.index, 1) & flow.valid.to(deep.device)
        return {**new, "visual_pos_masks": shown, "deepstack_visual_embeds": flow.deepstack}

    def _continue(self, args: tuple, kwargs: dict) -> Any:
        """A decode step, a text turn or a draft on a cache that holds a pruned prompt."""
        x, cache = kwargs["inputs_embeds"], kwargs[CACHE]
        if cache.owner is not self.context.owner:
            adopt(cache, len(x), x.device, self.context.owner)
        if cache.busy:
            cache.busy = False  # left behind by a forward that failed
        if cache.is_compileable and cache.shifted and len(cache.groups) > 1:
            raise UnsupportedError(
                "compact positions, or those of resized pictures, with decoder-site stages need a dynamic cache; use "
                "cache_implementation=None"
            )
        shift = cache.groups[0].shift[:, None].to(x.device) if cache.shifted else None
        if shift is not None:
            kwargs = {**kwargs, "position_ids": lagging(kwargs, shift)}
        if x.shape[1] == 1 and cache.is_compileable:
            return args, self._static_step(kwargs)
        if x.shape[1] == 1 and not self.context.steering and self._level(cache, kwargs.get("attention_mask")):
            if self.taps_steps:
                self._begin(None, cache)
            return args, kwargs
        return self._go_on(args, kwargs, shift, self.taps_steps or cache.table is not None)

    def _static_step(self, kwargs: dict) -> dict:
        """Arguments of a decode step on a static cache, which may be compiled."""
        cache, single = kwargs[CACHE], len(kwargs[CACHE].groups) == 1
        if not single:
            self.run.flow = StaticStep(cache, kwargs["inputs_embeds"])
        stock = single and cache.dense and cache.prompt_mask is None
        return kwargs if stock else {**kwargs, "attention_mask": cache.valid[0]}

    def _stock(self, cache: PrunedCache, x: Tensor) -> bool:
        """Whether a decode step without a mask can run as the model's own, with nothing to be done here."""
        return (
            x.shape[1] == 1
            and self._level(cache, None)
            and not cache.shifted
            and cache.owner is self.context.owner
            and not self.taps_steps
            and not cache.is_compileable  # type: ignore[attr-defined]
            and cache.groups[0].end > 0
        )

    def _level(self, cache: PrunedCache, mask: Tensor | None) -> bool:
        """Whether the model's own code is right for a decode step: no padding, and layers that need no masks of their
        own."""
        if cache.table is not None or not cache.dense or not (mask is None or mask.ndim == 4):
            return False
        return len(cache.groups) == 1 or (mask is None and self.maskless and not cache.shifted)

    @eager
    def _go_on(self, args: tuple, kwargs: dict, shift: Tensor | None, taps: bool) -> Any:
        """A forward that needs a mask or taps: rows of different lengths, several new tokens, layers that hold
        different tokens."""
        flow = forward_of(self.context, kwargs)
        if shift is not None:
            flow.positions = flow.positions + shift
        self._begin(flow, flow.cache, taps=taps)
        mask: Any = flow.enter(0)
        if flow.cache.is_compileable and flow.mask is not None:
            flow.cache.masked(flow.mask)
        if self.slides and mask is not None:
            mask = layer_masks(self.lm.config, flow.hidden, mask, flow.cache)
        kwargs = {**kwargs, "attention_mask": mask}
        if self.unmerge is not None:
            self.unmerge.go_on(flow)
        return args, kwargs

    @eager
    def _begin(self, flow: ForwardState | None, cache: Any, *, taps: bool = True) -> None:
        """From here on hooks find the state of this forward, and taps are on."""
        self.run.flow = flow
        if isinstance(cache, PrunedCache):
            self.run.cache, cache.busy = cache, True
        if taps:
            self.switch.on()

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        cache = kwargs.get(CACHE, kwargs.get(FORMER))
        one = out.last_hidden_state.shape[1] == 1  # as `steps`, without a call
        return None if one and cache is not None and not getattr(cache, "busy", False) else self._finish(out, cache)

    @eager
    def _finish(self, out: Any, cache: Any) -> Any:
        flow, self.run.flow, self.run.cache = self.run.flow, None, None
        # A layer that is to be run again by the backward pass attends as it did.
        if not replays(self.lm.layers[0]):
            self.switch.off()
        if isinstance(cache, PrunedCache):
            cache.busy = False
        if not isinstance(flow, PrefillState):
            return None
        self.run.forget()
        if self.shrinker is not None:
            self.shrinker.finish(flow)
        if flow.clears:
            clear_earlier(flow, self.context.attending)
        for start, slots in sorted(flow.pending_slots.items()):
            flow.cache.record(start, slots)
        if self.chooser is not None:
            self.chooser.finish(flow)
        flow.trace.cache_bytes = cache_bytes(getattr(out, CACHE, None))
        clock, began = flow.began
        flow.trace.clock = partial(clock.between, began, clock.now())
        check_labels(flow)
        if not flow.layouts or (flow.dense and not flow.changed):
            return None
        restore(out, flow, self.context.depth, self.context.attending)
        return out
