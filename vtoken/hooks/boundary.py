"""The language-model boundary: everything that enters the decoder is shortened here, coherently.

Features were merged into the prompt by the model itself, so ids and placeholders no longer matter. Embeddings, positions and masks are
cut to the live tokens and rows packed to the left-padded maximum of the batch; afterwards `last_hidden_state` gets its length back (zeros
where tokens were dropped), so that logits and labels keep their shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vtoken.errors import UnsupportedError
from vtoken.hooks.cache import Owner, PrunedCache, Slots, adopt, cache_bytes
from vtoken.hooks.flow import Flow, StaticStep, Visual
from vtoken.hooks.handle import Handle
from vtoken.hooks.images import assign, check_probe
from vtoken.hooks.layout import logical_mask, take
from vtoken.run import Encode, Lineage, Run, Trace
from vtoken.stages import Fact, Keep, Stage


class Boundary:
    """Hooks on the model, on `outer` (which sees ids) and on the language model.

    Args:
        stages: tokens-site stages, in pipeline order.
        compact: renumber positions after dropping, decode positions included.
        always: take over the cache at every prefill with images, because later stages shorten inside the decoder.
        resolve: the fact as the encoder stored it (layers resolved).
    """

    def __init__(
        self,
        adapter: Any,
        run: Run,
        handle: Handle,
        stages: Sequence[Stage],
        *,
        compact: bool,
        always: bool,
        owner: Owner,
        resolve: Callable[[Fact], Fact],
    ) -> None:
        self.adapter, self.run, self.stages, self.owner, self.resolve = adapter, run, list(stages), owner, resolve
        self.compact, self.always, self.last = compact, always, None
        handle.before(adapter.model, self._call)
        handle.before(adapter.outer, self._outer)
        handle.before(adapter.lm, self._before)
        handle.after(adapter.lm, self._after)

    def _call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remembers what only the outermost call knows; nothing on decode steps, which may be compiled."""
        ids = kwargs.get("input_ids")
        if ids is None or ids.shape[1] > 1:
            wanted = kwargs.get("logits_to_keep")
            self.run.labels = kwargs.get("labels")
            self.run.tail = wanted - 1 if type(wanted) is int and wanted > 1 else 0

    def _outer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Remembers which positions are visual: ids cannot be seen any more inside the language model."""
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = embeds if ids is None else ids
        if given is None or given.shape[1] == 1:
            return
        encoded = kwargs.get("mm_encoder_outputs") or {}
        has_features = any(kwargs.get(k) is not None for k in ("pixel_values", "pixel_values_videos")) or any(
            v is not None for v in encoded.values()
        )
        self.run.visual = self.adapter.visual_mask(ids, embeds) if has_features else None

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        x, cache, run = kwargs["inputs_embeds"], kwargs.get("past_key_values"), self.run
        if x.shape[1] == 1:
            return self._continue(module, args, kwargs) if isinstance(cache, PrunedCache) else None
        run.flow, visual, run.visual = None, run.visual, None
        if visual is not None and visual.shape == x.shape[:2]:
            return self._prefill(module, args, kwargs, visual.to(x.device))
        if isinstance(cache, PrunedCache):
            return self._continue(module, args, kwargs)
        if cache is None or not int(cache.get_seq_length()):
            run.trace = self.last = Trace()
        return None

    def _flow(self, module: nn.Module, kwargs: dict) -> Flow:
        """The state of this forward before anything is decided."""
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get("past_key_values")
        batch, length = x.shape[:2]
        if isinstance(mask, dict):
            mask = mask["full_attention"]
        past = int(cache.get_seq_length()) if cache is not None else 0
        if torch.is_tensor(mask) and mask.ndim == 4:
            if cache is None or not cache.is_compileable:
                raise UnsupportedError(
                    "a custom 4D attention mask cannot be kept consistent when tokens are dropped; pass a 2D padding mask"
                )
            # generate() built it for a static cache from logical lengths; only its padding matters here.
            adopted = isinstance(cache, PrunedCache) and past
            mask = cache.prompt_mask if adopted else as_bool(mask)[:, 0, -1, past : past + length]
        new = logical_mask(mask, batch, length, past, x.device)
        positions = kwargs.get("position_ids")
        if positions is None:
            positions = (torch.arange(length, device=x.device) + past)[None]
        index = torch.arange(length, device=x.device).expand(batch, -1)
        return Flow(new, [length] * batch, past, mask, positions, cache, x, new, index, new)

    def _prefill(self, module: nn.Module, args: tuple, kwargs: dict, visual: Tensor) -> Any:
        flow = self._flow(module, kwargs)
        x, cache = flow.hidden, flow.cache
        if flow.mask is not None and cache is not None and cache.is_compileable:
            prompt_mask = flow.mask
        else:
            prompt_mask = None
        visual = visual & flow.new
        counts = torch.stack([visual.sum(1), flow.new.sum(1)]).tolist()
        flow.real = counts[1]
        flow.trace = self.run.trace = self.last = Trace()
        flow.labels, flow.tail = self.run.labels, self.run.tail
        values = self._images(flow, visual, counts[0])
        depth = len(self.adapter.lm.layers)
        for stage in self.stages:
            values = flow.decide(stage, values, self._facts(flow, stage, x))
        flow.changed = flow.visual.lineage.home is not None or flow.counts != flow.real
        flow.trace.layers = [list(flow.visual.lengths)] * depth
        flow.trace.prompt_tokens = flow.counts
        self.run.flow = flow
        if not flow.changed and not self.always and not isinstance(cache, PrunedCache):
            return None
        if cache is None and (kwargs.get("use_cache") if kwargs.get("use_cache") is not None else module.config.use_cache):
            flow.cache = cache = DynamicCache(config=module.config)
        if flow.visual.lineage.home is not None:
            x = x.clone()
            x[flow.visual.line, flow.visual.column] = values.to(x.dtype)
        flow.relayout()
        flow.hidden = take(x, flow.index, 1).masked_fill(~flow.valid[..., None], 0)
        mask = self.enter(flow, 0)
        if cache is not None and prompt_mask is not None:
            cache.prompt_mask = prompt_mask
        positions = flow.compact(0) if self.compact else take(flow.positions, flow.index, -1)
        if cache is None and mask is None:
            # Gaps in position ids without mask and cache would be taken for packed sequences.
            mask = torch.ones(flow.index.shape, dtype=torch.long, device=x.device)
        new = {"inputs_embeds": flow.hidden, "position_ids": positions, "attention_mask": mask, "past_key_values": cache}
        return args, {**kwargs, **new}

    def _images(self, flow: Flow, visual: Tensor, counts: list[int]) -> Tensor:
        """Finds the images of the batch; returns the [ΣN, D] visual embeddings that the encoder left."""
        encode, trace = self.run.encode, flow.trace
        lengths, grid, row, source = assign(counts, encode, self.adapter)
        line, column = visual.nonzero(as_tuple=True)
        device = line.device
        image = torch.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths)) if lengths else line
        starts = torch.tensor([0, *lengths], device=device).cumsum(0)[:-1]
        place = torch.arange(len(line), device=device) - starts[image]
        flow.source = source
        values = flow.hidden[line, column]
        trace.visual_tokens, trace.grid, trace.row = list(lengths), list(grid), list(row)
        home = None
        if encode is not None:
            home = encode.home if encode.home is None or source is None else encode.home[source.to(encode.home.device)]
            check_probe(values, encode, source)
        flow.visual = flow.started = Visual(lengths, grid, row, line, column, image, Lineage(lengths, place, lengths))
        if encode is not None and encode.stages:
            alive = (~values[:, 0].isnan()).nonzero()[:, 0]
            left = torch.bincount(image[alive], minlength=len(lengths)).tolist()
            flow.visual = flow.visual.after(Keep(alive, tuple(left)))
            values = values[alive]
            trace.stages += encode.stages
        if home is not None:
            flow.visual = flow.visual.with_home(home.to(device))
        return values

    def _facts(self, flow: Flow, stage: Stage, x: Tensor) -> dict[Fact, Any]:
        needs = stage.needs()
        if not needs:
            return {}
        v, encode, out = flow.visual, self.run.encode, {}
        starts = torch.tensor([0, *v.lineage.full], device=v.image.device).cumsum(0)[:-1]
        live = starts[v.image] + v.lineage.place
        for need in needs:
            if need.name == "text":
                text = flow.new.clone()
                text[flow.started.line, flow.started.column] = False
                out[need] = [x[r, text[r]] for r in range(len(x))]
                continue
            if encode is None:
                raise UnsupportedError(
                    f"stage {stage.name} needs {need.name}, but the features in this call were not encoded by this model in this "
                    "thread; pass pixel_values instead of precomputed features"
                )
            full = encode.facts[self.resolve(need)]
            index = live if flow.source is None else flow.source.to(live.device)[live]
            out[need] = full[index.to(full.device)].to(x.device)
        return out

    def _continue(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """A decode step, a text turn or a draft on a cache that holds a pruned prompt."""
        x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs["past_key_values"]
        if cache.owner is not self.owner:
            adopt(cache, len(x), x.device, self.owner)
        one = x.shape[1] == 1
        if cache.shifted:
            shift = cache.groups[0].shift[:, None].to(x.device)
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(x.shape[1], device=x.device)[None] + cache.get_seq_length()
            kwargs = {**kwargs, "position_ids": positions - shift}
        single = len(cache.groups) == 1
        if cache.shifted and not single and cache.is_compileable:
            raise UnsupportedError("compact positions with decoder-site stages need a dynamic cache; use cache_implementation=None")
        if one and cache.is_compileable:
            if not (cache.dense and single):
                kwargs = {**kwargs, "attention_mask": cache.valid[0]}
            if not single:
                self.run.flow = StaticStep(cache, x)
            return args, kwargs
        maskless = module.config._attn_implementation == "sdpa" or "flash" in (module.config._attn_implementation or "")
        uniform = single or (mask is None and maskless and not cache.shifted)
        if one and cache.dense and uniform and (mask is None or mask.ndim == 4):
            return args, kwargs
        flow = self._flow(module, kwargs)
        if cache.shifted:
            flow.positions = flow.positions + shift
        self.run.flow = flow
        kwargs = {**kwargs, "attention_mask": self.enter(flow, 0)}
        return args, kwargs

    def enter(self, flow: Flow, start: int) -> Tensor | None:
        """Opens the layer group from `start` on and returns its 2D mask over physical slots, past and new; None when all are real."""
        cache, ok = flow.cache, flow.valid
        dense = len(set(flow.counts)) == 1 and flow.counts[0] == flow.index.shape[1]
        if cache is not None:
            batch, device = len(ok), ok.device
            adopt(cache, batch, device, self.owner)
            group = cache.group(start)
            old = cache.logical(group, flow.past)
            held = old >= 0
            if flow.mask is not None and old.shape[1]:
                mask = flow.mask.to(held.device).bool()
                mask = torch.nn.functional.pad(mask, (0, max(0, flow.past - mask.shape[1])), value=True)
                held = held & mask.gather(1, old.clamp(min=0))
            ok = torch.cat([held, ok.to(held.device)], 1)
            if flow.visual is not None:
                now = torch.where(flow.valid, flow.index + flow.past, -1).to(old.device)
                shift = flow.shift(start) if self.compact else torch.zeros_like(cache.groups[group].shift)
                everything = torch.cat([old, now], 1)
                flow.records[start] = Slots(
                    everything, flow.past + flow.new.shape[1], shift, dense and cache.groups[group].dense
                )
        flow.slots = ok.shape[1]
        all_real = dense and flow.mask is None and (cache is None or cache.groups[cache.group(start)].dense)
        flow.ok = None if all_real or bool(ok.all()) else ok.long()
        return flow.ok

    def _after(self, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> Any:
        flow, self.run.flow = self.run.flow, None
        if not isinstance(flow, Flow) or flow.visual is None:
            return None
        for start, slots in sorted(flow.records.items()):
            flow.cache.record(start, slots)
        flow.trace.cache_bytes = cache_bytes(getattr(out, "past_key_values", None))
        if flow.labels is not None:
            check_labels(flow)
        hidden = out.last_hidden_state
        if hidden.shape[1] == flow.new.shape[1] and not flow.changed:
            return None
        index, valid = flow.index.to(hidden.device)[..., None], flow.valid.to(hidden.device)[..., None]
        full = hidden.new_zeros(len(hidden), flow.new.shape[1], hidden.shape[2])
        out.last_hidden_state = full.scatter(1, index.expand_as(hidden), hidden.masked_fill(~valid, 0))
        return out


def as_bool(mask: Tensor) -> Tensor:
    """What a 4D mask lets through, whatever its dtype."""
    return mask == 0 if mask.is_floating_point() else mask.bool()


def check_labels(flow: Flow) -> None:
    """A dropped token predicts nothing, so nothing may be supervised on it.

    Raises:
        ValueError: a label that is not -100 follows a dropped token.
    """
    labels = flow.labels.to(flow.alive.device)
    if labels.shape == flow.alive.shape and bool((labels[:, 1:] != -100)[flow.new[:, :-1] & ~flow.alive[:, :-1]].any()):
        raise ValueError(
            "labels supervise the token after a dropped visual token, which has no logits; "
            "set labels to -100 on image tokens and on the token that follows an image"
        )
