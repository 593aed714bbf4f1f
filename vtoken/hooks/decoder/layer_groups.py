"""Decoder-layer groups: everything is shortened once at layer k; later layers get a mask of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.hooks.decoder.blocks import changed_since
from vtoken.hooks.decoder.next_layer import check_next_layer, next_layer_attention
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.checkpointing import check_replay
from vtoken.hooks.state.context import Context, by_layer
from vtoken.hooks.state.encoder_fact import encoder_fact
from vtoken.hooks.state.forward_state import ForwardState, StaticStep, eager
from vtoken.hooks.state.layer_kinds import kinds_of, layer_mask, rotary
from vtoken.hooks.state.left_padding import take
from vtoken.hooks.state.prefill_state import AskedText, Observed, PrefillState
from vtoken.hooks.state.prompt_text import dropped_slots, later_text, text_before, text_of
from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.stages import Fact, FactSpec, Stage, VisualTokens, spec_of


class LayerGroups:
    """Pre-hooks on the decoder layers; none when no stage acts there (but flash attention needs its position ids
    hidden)."""

    def __init__(self, context: Context) -> None:
        self.context, self.lm, self.run, handle = context, context.lm, context.run, context.handle
        lm, depth, self.attending = self.lm, context.depth, frozenset(context.attending)
        stages = [stage.for_depth(depth) for stage in context.at("decoder")]
        self.at, self.kinds = by_layer(stages, depth), kinds_of(lm.config)
        self.rating = [stage for stage in stages if asks(stage, "queries", "chosen")]
        for k, at in self.at.items():
            if any(asks(stage, "read", "next layer") for stage in at):
                check_next_layer(lm.layers[k])
        self.flash = "flash" in (lm.config._attn_implementation or "")
        if stages or self.flash or context.cache_stage is not None:
            for k, layer in enumerate(lm.layers):
                handle.before(layer, partial(self._layer, k))
        if stages and hasattr(lm, "_deepstack_process"):
            handle.set(lm, "_deepstack_process", partial(self._deepstack, lm._deepstack_process))

    def _layer(self, k: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        cache: Any = kwargs.get(CACHE)
        if hidden.shape[1] > 1 or cache is None or getattr(cache, "busy", False):  # not `steps`, without a call
            return self._shorten(k, module, args, kwargs)
        if cache.is_compileable and isinstance(cache, PrunedCache) and len(cache.groups) > 1:
            return args, self._static(k, self.run.flow, kwargs)
        return None

    @eager
    def _shorten(self, k: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        hidden, flow = args[0] if args else kwargs["hidden_states"], self.run.flow
        if flow is None:
            return None
        check_replay(module)
        given, kwargs = kwargs, {**kwargs, **self._moved(k, flow, kwargs)}
        if k == 0 and isinstance(flow, PrefillState):
            self._rate(flow, hidden)
        short = self._open(k, flow, hidden, kwargs) if k else hidden
        kwargs.update(self._moved(k, flow, given))
        if args:
            args = (short, *args[1:])
        else:
            kwargs["hidden_states"] = short
        if self.flash:
            # Gaps in position ids look like packed sequences to flash attention; RoPE is in position_embeddings
            # already.
            kwargs["position_ids"] = None
        if flow.group:
            kwargs["attention_mask"] = self._mask_of(k, flow, short)
        return args, kwargs

    def _mask_of(self, k: int, flow: ForwardState, hidden: Tensor) -> Any:
        """What layer k is given: the backend's mask, or of a layer that keeps a state which of the new slots are
        real."""
        if k not in self.attending:
            return None if flow.key_mask is None else flow.valid.to(hidden.device)
        kind = self.kinds[k]
        if kind not in flow.masks:
            flow.masks[kind] = self._mask(k, flow.cache, hidden, flow.key_mask, flow.slot_blocks())
        return flow.masks[kind]

    def _moved(self, k: int, flow: ForwardState, kwargs: dict) -> dict[str, Any]:
        """RoPE and position ids of the tokens that are left of a prompt, in place of those that the model gives layer k
        for all of them."""
        if flow.chosen is None and flow.numbers is None:
            return {}
        kind = self.kinds[k]
        if kind not in flow.layer_kwargs:
            ids, rope = kwargs.get("position_ids"), kwargs["position_embeddings"]
            if flow.numbers is not None:
                ids, rope = flow.numbers, rotary(self.lm, k, flow.hidden, flow.numbers)
            elif flow.chosen is not None:
                ids = None if ids is None else take(ids, flow.chosen, -1)
                rope = tuple(take(t, flow.chosen, -2) for t in rope)
            flow.layer_kwargs[kind] = {"position_embeddings": rope, "position_ids": ids}
        return flow.layer_kwargs[kind]

    def _open(self, k: int, flow: ForwardState, hidden: Tensor, kwargs: dict) -> Tensor:
        """Enters the group that starts at k, if one does; returns the hidden states it works on."""
        known = isinstance(flow.cache, PrunedCache) and k in flow.cache.groups
        dropped, clears = False, any(stage.clears_earlier_layers() for stage in self.at[k])
        if isinstance(flow, PrefillState):
            before = flow.live
            hidden = self._decide(k, flow, hidden, kwargs["position_embeddings"])
            dropped = flow.live is not before
        if not known and not dropped:
            if clears and isinstance(flow, PrefillState):
                flow.clears = flow.group  # of what an earlier cut dropped
            return hidden
        if isinstance(flow, PrefillState) and dropped:
            index, valid = flow.relayout()
            hidden = take(hidden, index, 1)
            if not flow.dense:
                hidden = hidden.masked_fill(~valid[..., None].to(hidden.device), 0)
            flow.chosen = index if flow.chosen is None else flow.chosen.gather(1, index)
        if self.context.compact:
            flow.numbers = flow.compact(k).to(hidden.device)
        flow.hidden, flow.group, flow.masks, flow.layer_kwargs = hidden, k, {}, {}
        flow.enter(k)
        if isinstance(flow, PrefillState):
            flow.note_layout(k)
            if clears:
                flow.clears = k
        return hidden

    @torch.no_grad()
    def _rate(self, flow: PrefillState, hidden: Tensor) -> None:
        """Asks stages which text tokens shall rate the images, given the embeddings that enter the decoder."""
        for stage in self.rating if flow.skip_reason is None else ():
            batch_row, column = (i.to(hidden.device) for i in flow.slot())
            v, x = flow.live, hidden[batch_row, column]
            tokens = VisualTokens.pack(
                x,
                v.lengths,
                v.parts,
                v.row,
                v.history.raster_index.to(x.device),
                facts={Fact("later_text"): later_text(flow, hidden)},
                layer=0,
            )
            chosen = zip(stage.query_tokens(tokens), text_before(flow), strict=True)
            flow.asked[id(stage)] = AskedText([index + n for index, n in chosen])

    def _decide(self, k: int, flow: PrefillState, hidden: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        for stage in self.at[k]:
            if flow.skip_reason is not None:
                flow.decide(stage, hidden, {}, layer=k)
                continue
            batch_row, column = (i.to(hidden.device) for i in flow.slot())
            x = hidden[batch_row, column]
            facts = {need: self.fact(need, k, stage, flow, hidden, rope) for need in stage.needs()}
            kept = flow.decide(stage, x, facts, layer=k)
            if kept is not x and flow.live.history.slot is not None:  # choosing alone changes no value
                batch_row, column = (i.to(hidden.device) for i in flow.slot())
                hidden = hidden.clone()
                hidden[batch_row, column] = kept
        flow.trace.layers[k:] = [list(flow.live.lengths)] * (len(self.at) - k)
        return hidden

    @eager
    def _deepstack(self, original: Callable[..., Tensor], hidden: Tensor, where: Tensor, features: Tensor) -> Tensor:
        """DeepStack adds visual features after the first layers: behind a cut, to the tokens that are left."""
        flow = self.run.flow
        if isinstance(flow, PrefillState):
            flow.deepstack_done += 1
            if flow.group:
                # The model still hands out what was alive when the decoder was entered.
                batch_row, column = flow.slot()
                where = torch.zeros(hidden.shape[:2], dtype=torch.bool, device=batch_row.device)
                where[batch_row, column] = True
                features = flow.deepstack[flow.deepstack_done - 1]
        return original(hidden, where.to(hidden.device), features)

    def fact(
        self, fact: Fact, k: int, stage: Stage, flow: PrefillState, hidden: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Any:
        """A fact for a stage at layer k, see FACTS; of the text, per row."""
        spec = spec_of(fact.name, "decoder")
        assert spec is not None
        if spec.of_encoder:
            return encoder_fact(self.context, flow, stage, fact).to(hidden.device)
        layer, name = k - 1 if fact.layer is None else fact.layer % len(self.at), spec.part_of or fact.name
        if spec.queries == "chosen":
            found = flow.asked[id(stage)].found[layer]
        elif spec.read == "decoder layer":
            found = flow.facts[Fact(name, layer)]
        else:
            found = Observed(self._entering(k, layer, spec, flow, hidden, rope), flow.index)
        values = found.now(flow.index, flow.new.shape[1]).to(hidden.device)
        if spec.per == "row":
            return text_of(flow, values)
        flat = values.ndim > 2 and spec.holds != "each head"
        if spec.per == "image":
            return [text.flatten(1) if flat else text for text in later_text(flow, values)]
        rows, columns = (i.to(hidden.device) for i in flow.slot())
        return values[rows, columns].flatten(1) if flat else values[rows, columns]

    def _entering(
        self, k: int, since: int, spec: FactSpec, flow: PrefillState, hidden: Tensor, rope: tuple[Tensor, Tensor]
    ) -> Tensor:
        """[B, P, ...] what is read of the hidden states that enter layer k, of their positions, or of what layers from
        `since` on did to them."""
        if spec.read == "positions":
            return self._turning(k, spec.name, flow, hidden)
        if spec.read == "blocks":
            return changed_since(flow, since, k)
        if spec.read == "hidden states":
            normed = "normed" in (spec.name, spec.part_of)
            return getattr(self.lm, self.context.adapter.final_norm)(hidden) if normed else hidden
        if self.context.compact:
            ids = flow.compact(k)
            ids = ids - dropped_slots(flow).cumsum(1).to(ids.device)
            rope = rotary(self.lm, k, hidden, ids.to(hidden.device))
        return next_layer_attention(self.context.adapter, k, flow, hidden, rope, text=spec.queries == "text")

    def _turning(self, k: int, name: str, flow: PrefillState, hidden: Tensor) -> Tensor:
        """[B or 1, P] mean cosine or sine of layer k's RoPE, over channels and position axes, in float32. Every axis
        turns all channels here: before they are shared out among the axes."""
        compact = self.context.compact
        ids = (flow.compact(flow.group) if compact else take(flow.positions, flow.index, -1)).to(hidden.device)
        plain = hidden.new_empty(0, dtype=torch.float32)
        # Of four axes the first is that of masks.
        axes = [axis.expand(3, *axis.shape) for axis in ids[-3:]] if ids.ndim == 3 else [ids]
        turned = [rotary(self.lm, k, plain, axis)[name == "mean_sin"].mean(-1) for axis in axes]
        return torch.stack(turned).mean(0)

    def _static(self, k: int, step: StaticStep, kwargs: dict) -> dict:
        group = step.cache.group(k)
        if not group or k not in self.attending:
            return kwargs
        kind = self.kinds[k]
        if (group, kind) not in step.masks:
            step.masks[group, kind] = self._mask(k, step.cache, step.hidden, step.cache.valid[group])
        return {**kwargs, "attention_mask": step.masks[group, kind]}

    def _mask(self, k: int, cache: Any, hidden: Tensor, key_mask: Tensor | None, blocks: Tensor | None = None) -> Any:
        """The backend's mask for layer k and those of its kind in its group."""
        if cache is None and key_mask is None:
            key_mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return layer_mask(self.lm.config, k, hidden, key_mask, cache, blocks)


def asks(stage: Stage, column: str, value: str) -> bool:
    """Whether the stage needs a fact whose row of FACTS has this value in this column."""
    return any(getattr(spec_of(need.name, "decoder"), column) == value for need in stage.needs())
