"""The language-model boundary: everything that enters the decoder is shortened here, coherently.

Features were merged into the prompt by the model itself, so ids and placeholders no longer matter. Embeddings, positions and masks are
cut to the live tokens and rows packed to the left-padded maximum of the batch; afterwards outputs get their length back (zeros where tokens
were dropped, see outputs.py), so that logits and labels keep their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vtoken.errors import UnsupportedError
from vtoken.hooks.attention.unmerge import Unmerge
from vtoken.hooks.boundary.calls import check_labels, check_packed
from vtoken.hooks.boundary.outputs import restore
from vtoken.hooks.boundary.prefill_start import PrefillBuilder
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.fact_tables import substituted
from vtoken.hooks.state.forward_state import ForwardState, PrefillState, StaticStep, eager, steps
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.left_padding import take
from vtoken.hooks.state.pruned_cache import CacheOwner, PrunedCache, SlotMap, adopt, cache_bytes
from vtoken.hooks.state.run import UNSEEN, Run
from vtoken.hooks.state.trace import StageTrace, Trace
from vtoken.stages import Fact, Stage


class Boundary:
    """Hooks on the language model.

    Args:
        stages: tokens-site stages, in pipeline order.
        compact: renumber positions after dropping, decode positions included.
        every: stages of any site.
        always: take over the cache at every prefill with images, because later stages shorten inside the decoder.
        newline: which newline tokens stay, see Prefill.
        resolve: the fact as the encoder stored it (layers resolved, substituted).
        unmerge: lets attention see merged tokens at all their places, if a stage asks for that.
        kv: shrinks the cache.
        min_tokens: as in Entry.
    """

    def __init__(
        self,
        adapter: Any,
        run: Run,
        handle: Handle,
        stages: Sequence[Stage],
        *,
        compact: bool,
        every: Sequence[Stage],
        always: bool,
        newline: str,
        owner: CacheOwner,
        resolve: Callable[[Fact], Fact],
        unmerge: Unmerge | None = None,
        kv: CacheShrinker | None = None,
        min_tokens: int = 0,
    ) -> None:
        self.adapter, self.run, self.owner, self.unmerge = adapter, run, owner, unmerge
        self.stages = [(stage, substituted(stage, adapter.substitutes)) for stage in stages]
        self.compact, self.always, self.kv, self.every = compact, always, kv, every
        self.entry = PrefillBuilder(adapter, run, resolve, newline, acts=bool(every), min_tokens=min_tokens)
        self.switch = handle.switch
        self.last: Trace | None = None
        handle.before(adapter.lm, self._before)
        handle.after(adapter.lm, self._after)

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        # An exception in an earlier forward may have left its state behind.
        self.run.flow = None
        cache = kwargs.get("past_key_values")
        first = cache is None or (not cache.is_compileable and not cache.get_seq_length())
        if first or kwargs["inputs_embeds"].shape[1] > 1:
            return self._several(args, kwargs)
        return self._continue(args, kwargs) if isinstance(cache, PrunedCache) else None

    @eager
    def _several(self, args: tuple, kwargs: dict) -> Any:
        self.switch.off()
        x, cache, run = kwargs["inputs_embeds"], kwargs.get("past_key_values"), self.run
        visual, run.live = run.live, None
        if visual is not None and visual.shape == x.shape[:2]:
            return self._prefill(args, kwargs, visual.to(x.device))
        if isinstance(cache, PrunedCache):
            return self._continue(args, kwargs)
        if cache is None or not int(cache.get_seq_length()):
            run.trace = self.last = Trace(
                stages=[StageTrace(s.name, s.site, [], [], [], stood_aside=UNSEEN) for s in self.every if run.unseen]
            )
        return None

    def _flow(self, kwargs: dict) -> ForwardState:
        """The state of this forward before anything is decided."""
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        batch, length = x.shape[:2]
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if mask is not None and mask.ndim == 4:
            if cache is None or not cache.is_compileable:
                raise UnsupportedError(
                    "a custom 4D attention mask cannot be kept consistent when tokens are dropped; pass a 2D padding mask"
                )
            # generate() built it for a static cache from logical lengths; only its padding matters here.
            adopted = isinstance(cache, PrunedCache) and past
            mask = cache.prompt_mask if adopted else as_bool(mask)[:, 0, -1, past : past + length]
        if mask is None:
            new = torch.ones(batch, length, dtype=torch.bool, device=x.device)
        else:
            new = mask[:, -length:].to(x.device).bool()
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = torch.arange(past, past + length, device=x.device)[None]
        index = torch.arange(length, device=x.device).expand(batch, -1)
        return ForwardState(new, [length] * batch, past, mask, positions, cache, x, new, index, new)

    def _prefill(self, args: tuple, kwargs: dict, visual: Tensor) -> Any:
        if self.every:
            check_packed(kwargs, self.adapter.lm.config)
        flow, values = self.entry.start(self._flow(kwargs), visual, kwargs.get("deepstack_visual_embeds"))
        self.last = flow.trace
        x, cache, trace = flow.hidden, flow.cache, flow.trace
        for stage, given in self.stages:
            facts = self.entry.facts(flow, stage) if flow.skip_reason is None else {}
            values = flow.decide(stage, values, facts, substitutes=given)
        trace.layers = [list(flow.live.lengths)] * len(self.adapter.lm.layers)
        trace.prompt_tokens = list(flow.counts)
        self._begin(flow, flow.cache)
        acts = flow.changed or (self.always and flow.skip_reason is None)
        if not acts and not isinstance(cache, PrunedCache):
            if self.unmerge is not None:
                self.unmerge.prefill(flow, self.enter)
            return None
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.adapter.lm.config.use_cache if use_cache is None else use_cache):
            flow.cache = cache = DynamicCache(config=self.adapter.lm.config)
        if self.kv is not None and flow.skip_reason is None:
            self.kv.check(cache)
        if flow.live.history.absorbed_by is not None:
            x = x.clone()
            x[flow.live.batch_row, flow.live.column] = values.to(x.dtype)
        flow.relayout()
        flow.hidden = take(x, flow.index, 1)
        if not flow.dense:
            flow.hidden = flow.hidden.masked_fill(~flow.valid[..., None], 0)
        mask = self.enter(flow, 0)
        self._begin(flow, flow.cache)
        flow.note_layout(0)
        if cache is not None and cache.is_compileable:
            cache.prompt_mask = flow.mask
        positions = flow.compact(0) if self.compact else take(flow.positions, flow.index, -1)
        if self.unmerge is not None:
            self.unmerge.prefill(flow, self.enter)
        if cache is None and mask is None:
            # Gaps in position ids without mask and cache would be taken for packed sequences.
            mask = torch.ones(flow.index.shape, dtype=torch.long, device=x.device)
        new = {
            "inputs_embeds": flow.hidden,
            "position_ids": positions,
            "attention_mask": mask,
            "past_key_values": cache,
        }
        deep = kwargs.get("visual_pos_masks")
        if deep is not None:
            new["visual_pos_masks"] = take(deep, flow.index, 1) & flow.valid.to(deep.device)
            new["deepstack_visual_embeds"] = flow.deepstack
        return args, {**kwargs, **new}

    def _continue(self, args: tuple, kwargs: dict) -> Any:
        """A decode step, a text turn or a draft on a cache that holds a pruned prompt."""
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs["past_key_values"]
        if cache.owner is not self.owner:
            adopt(cache, len(x), x.device, self.owner)
        if cache.busy:
            cache.busy = False  # left behind by a forward that failed
        one = x.shape[1] == 1
        if cache.shifted:
            shift = cache.groups[0].shift[:, None].to(x.device)
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None] + cache.get_seq_length()
            kwargs = {**kwargs, "position_ids": positions - shift}
        single = len(cache.groups) == 1
        if cache.shifted and not single and cache.is_compileable:
            raise UnsupportedError(
                "compact positions with decoder-site stages need a dynamic cache; use cache_implementation=None"
            )
        if one and cache.is_compileable:
            if not (cache.dense and single):
                kwargs = {**kwargs, "attention_mask": cache.valid[0]}
            if not single:
                self.run.flow = StaticStep(cache, x)
            return args, kwargs
        backend = self.adapter.lm.config._attn_implementation or ""
        maskless = backend == "sdpa" or "flash" in backend
        uniform = single or (mask is None and maskless and not cache.shifted)
        packs = self.kv is not None and self.kv.goes_on
        if one and cache.table is None and cache.dense and uniform and (mask is None or mask.ndim == 4):
            if packs:
                self._begin(None, cache)
            return args, kwargs
        return self._go_on(args, kwargs, shift if cache.shifted else None, packs or cache.table is not None)

    @eager
    def _go_on(self, args: tuple, kwargs: dict, shift: Tensor | None, taps: bool) -> Any:
        """What cannot be told from shapes: rows of different lengths, several new tokens, layers that hold different ones."""
        flow = self._flow(kwargs)
        if shift is not None:
            flow.positions = flow.positions + shift
        self._begin(flow, flow.cache, taps=taps)
        kwargs = {**kwargs, "attention_mask": self.enter(flow, 0)}
        if self.unmerge is not None:
            self.unmerge.go_on(flow)
        return args, kwargs

    @eager
    def _begin(self, flow: ForwardState | None, cache: Any, *, taps: bool = True) -> None:
        """From here on hooks find the state of this forward, and taps are on."""
        self.run.flow = flow
        if isinstance(cache, PrunedCache):
            cache.busy = True
        if taps:
            self.switch.on()

    def enter(self, flow: ForwardState, start: int) -> Tensor | None:
        """Opens the layer group from `start` on and returns its 2D mask over physical slots, past and new; None when all are real."""
        cache, key_mask = flow.cache, flow.valid
        if cache is not None:
            batch, device = len(key_mask), key_mask.device
            adopt(cache, batch, device, self.owner)
            before = cache.groups[cache.group(start)]
            everything = flow.now() if isinstance(flow, PrefillState) else None
            if flow.past:
                old, held = flow.held(start)
                key_mask = torch.cat([held, key_mask.to(held.device)], 1)
                everything = None if everything is None else torch.cat([old, everything.to(old.device)], 1)
            if isinstance(flow, PrefillState):
                assert everything is not None
                # Nothing lags where positions are not compact.
                shift = flow.shift(start) if self.compact else before.shift
                flow.logical = everything
                lags = self.compact and (flow.changed or before.lags)
                flow.pending_slots[start] = SlotMap(
                    everything, flow.past + flow.new.shape[1], shift, flow.dense and before.dense, lags
                )
        elif isinstance(flow, PrefillState):
            flow.logical = flow.now()
        flow.slots = key_mask.shape[1]
        # The device is asked only when nothing but the user's mask can tell; the counts of a prefill are what its mask leaves.
        dense = flow.dense and (cache is None or before.dense)
        told = flow.mask is None or (isinstance(flow, PrefillState) and not flow.past)
        flow.key_mask = None if dense and (told or bool(key_mask.all())) else key_mask.long()
        return flow.key_mask

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        cache = kwargs.get("past_key_values")
        return None if steps(out.last_hidden_state, cache) else self._finish(out, cache)

    @eager
    def _finish(self, out: Any, cache: Any) -> Any:
        flow, self.run.flow = self.run.flow, None
        # A layer that is to be run again by the backward pass attends as it did.
        if not replays(self.adapter.lm.layers[0]):
            self.switch.off()
        if isinstance(cache, PrunedCache):
            cache.busy = False
        if not isinstance(flow, PrefillState):
            return None
        self.run.forget()
        if self.kv is not None:
            self.kv.finish(flow)
        for start, slots in sorted(flow.pending_slots.items()):
            flow.cache.record(start, slots)
        flow.trace.cache_bytes = cache_bytes(getattr(out, "past_key_values", None))
        check_labels(flow)
        if not flow.layouts or (flow.dense and not flow.changed):
            return None
        restore(out, flow, len(self.adapter.lm.layers))
        return out


def as_bool(mask: Tensor) -> Tensor:
    """What a 4D mask lets through, whatever its dtype."""
    return mask == 0 if mask.is_floating_point() else mask.bool()
