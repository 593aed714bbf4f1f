"""The KV cache is shrunk as the prefill fills it, layer by layer.

As soon as a layer has attended, nothing of this prefill reads its keys and values any more, so what the stage does not
keep is freed at once. Rows are padded on the left to the longest. Logical lengths stay as they were (pruned_cache.py);
layers that hold different numbers of tokens become layer groups of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from vtoken.errors import OtherModelError, UnsupportedError
from vtoken.hooks.cache.asked import asked
from vtoken.hooks.cache.cached_rows import PromptRow, slots_of, store
from vtoken.hooks.cache.requantize import Requantizer
from vtoken.hooks.cache.shrunk_layer import ShrunkLayer
from vtoken.hooks.decoder.attention_tap import tap
from vtoken.hooks.decoder.rotation import check_undone
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.classed_layer import ClassedLayer
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager, steps
from vtoken.hooks.state.layer_kinds import heads_in
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows
from vtoken.hooks.state.pruned_cache import SlotMap
from vtoken.hooks.state.quantized_layer import Piece, Plain, QuantizedLayer
from vtoken.hooks.state.run import Clock
from vtoken.stages import uploaded
from vtoken.stages.cache import CachedLayer, CacheStage, Decision, HeadClasses, KeepSlots, ReplacedKV
from vtoken.stages.quantized import QuantizedKV


class CacheShrinker:
    """A tap on every decoder layer with attention; what others keep is a state of fixed size.

    Attributes:
        goes_on: tokens after the prompt follow into few bits.

    Raises:
        UnsupportedError: the stage cannot run on this model.
    """

    def __init__(self, context: Context, stage: CacheStage) -> None:
        self.lm, self.run, self.stage = context.lm, context.run, stage
        self.rotary = None if context.adapter.mrope else self.lm.rotary_emb
        if why := stage.heads_incompatibility(*heads_in(self.lm.config)):
            raise OtherModelError(f"stage {stage.name}: {why}")
        try:
            self.compress = stage.compressor(context.adapter.model)
        except (ImportError, ValueError) as error:
            raise UnsupportedError(str(error)) from error
        self.attending = context.attending
        tap(context.handle, self.lm, self.attending, self._tap)
        self.goes_on = bool(stage.requantize_every())
        if self.goes_on:
            Requantizer(context, stage)
        if stage.rope:
            for k in self.attending:
                check_undone(stage, self.lm.layers[k].self_attn)
        if stage.native or stage.rope:
            for k in self.attending:
                context.handle.before(self.lm.layers[k].self_attn, self._remember)

    def check(self, cache: Any) -> None:
        """Refuses a prefill with images whose cache cannot shrink.

        Raises:
            UnsupportedError: says why, and what to do.
        """
        name = self.stage.name
        if replays(self.lm.layers[0]):
            raise UnsupportedError(
                f"stage {name} shrinks the KV cache, and gradient checkpointing runs layers without one: call "
                "model.gradient_checkpointing_disable(), or take the stage out"
            )
        if cache is None:
            raise UnsupportedError(
                f"stage {name} shrinks the KV cache, and this call has none (use_cache=False): pass use_cache=True, "
                "or take the stage out"
            )
        if cache.is_compileable:
            raise UnsupportedError(
                f"stage {name} shrinks the KV cache, but a static cache keeps its size: leave cache_implementation out"
            )
        layers = [layer for k, layer in enumerate(cache.layers) if k in self.attending]
        served = (DynamicLayer, QuantizedLayer, ClassedLayer)
        odd = {type(layer).__name__ for layer in layers if type(layer) not in served}
        if odd:
            raise UnsupportedError(
                f"stage {name} cannot shrink cache layers of kind {', '.join(sorted(odd))}; use a plain DynamicCache"
            )

    def _remember(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not steps(args[0] if args else kwargs["hidden_states"], kwargs.get(CACHE)):
            self._note(args, kwargs)

    @eager
    def _note(self, args: tuple, kwargs: dict) -> None:
        flow = self.run.flow
        if isinstance(flow, PrefillState):
            flow.notes.layer_input = args[0] if args else kwargs["hidden_states"], kwargs["position_embeddings"]

    def _tap(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        out = original()
        return self._attended(module, q, k, v, kwargs.get("scaling") or k.shape[-1] ** -0.5, out)

    @eager
    def _attended(self, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Any) -> Any:
        flow = self.run.flow
        if not isinstance(flow, PrefillState):
            return out
        if flow.skip_reason is None:
            return self._shrink(flow, module, q, k, v, scale, out)
        flow.skip(self.stage, flow.skip_reason)
        return out

    def _shrink(self, flow: PrefillState, module: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Any) -> Any:
        number, width = module.layer_idx, flow.index.shape[1]
        past = flow.slots - width
        rows, held, parts, told, same = [], [], [], True, True
        with Clock(k.device) as clock:
            for turn in self._turns(flow, number):
                row = prompt_rows(flow)[turn.start]
                begin = width - row.prompt - row.tail
                here = slice(past + begin, past + begin + row.prompt)
                x, y = k[turn, :, here].flatten(0, 1), v[turn, :, here].flatten(0, 1)
                decision: Decision | None = None
                seen = self.shown(flow, module, turn, x, y, q, scale)
                if seen is not None:
                    with torch.no_grad():
                        decision = self.compress(seen)
                    same = same and isinstance(decision, KeepSlots) and decision.index.shape[1] == row.prompt
                    told = told and not isinstance(decision, ReplacedKV)
                piece = apply(self.stage, decision, x, y)
                counts = row.counts if decision is None else getattr(decision, "counts", None)
                index = decision.index if isinstance(decision, KeepSlots) else None
                for r, own in zip(range(turn.start, turn.stop), heads_of(x, k.shape[1]), strict=True):
                    rows.append(replace(prompt_rows(flow)[r], stay=piece.length, counts=counts))
                    held.append(None if index is None else index[own])
                    mine = Plain(piece.keys[own], piece.values[own]) if isinstance(piece, Plain) else piece
                    parts.append((mine, Plain(k[r, :, here.stop :], v[r, :, here.stop :])))
        flow.shrunk[number] = ShrunkLayer(flow.group, tuple(rows), tuple(held), told, flow.live, clock)
        if same:
            return out
        cached = store(flow.cache.layers[number], parts, k, v, width)
        return self._behind(flow, rows, past, q, cached.keys, cached.values, scale, out) if any(flow.tails) else out

    def shown(
        self, flow: PrefillState, module: Any, turn: slice, x: Tensor, y: Tensor, q: Tensor, scale: float
    ) -> CachedLayer | None:
        """What the stage is given of the rows `turn`, decided together, whose prompts have keys and values x, y
        [heads, N, d]; None where it does not act."""
        r, row = turn.start, prompt_rows(flow)[turn.start]
        if not any(row.slots) or r in flow.skipped:
            return None
        begin = flow.index.shape[1] - row.prompt - row.tail
        here = slice(begin, begin + row.prompt)
        found = flow.notes.query_attention.pop((module.layer_idx, r), None)
        more = asked(self.stage, flow, module, r, here, x.device, self.rotary)
        where = {"layer": module.layer_idx, "depth": len(self.lm.layers), "attending": self.attending}
        queries = q[turn, :, here].flatten(0, 1)
        return CachedLayer(x, y, queries, row.images, row.slots, scale, query_attention=found, **more, **where)

    def _turns(self, flow: PrefillState, layer: int) -> list[slice]:
        """The rows that are decided together: one, or all, as more heads of one, where nothing tells them apart."""
        rows, found = prompt_rows(flow), flow.notes.query_attention
        alike = all((row.prompt, row.tail, row.slots) == (rows[0].prompt, rows[0].tail, rows[0].slots) for row in rows)
        if self.stage.by_head and alike and not flow.skipped and not any((layer, r) in found for r in range(len(rows))):
            return [slice(0, len(rows))]
        return [slice(r, r + 1) for r in range(len(rows))]

    def _behind(
        self,
        flow: PrefillState,
        rows: list[PromptRow],
        past: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Any,
    ) -> Any:
        """What follows the prompt in this forward (drafts) reads what is left of it, as it would in a forward of its
        own."""
        slots, new = k.shape[2] - past, max(flow.tails)
        length = torch.tensor([row.stay + row.tail for row in rows], device=k.device)
        real = torch.arange(slots, device=k.device) >= slots - length[:, None]
        before = real.new_ones(len(k), past) if flow.key_mask is None else flow.key_mask[:, :past].bool().to(k.device)
        visible = torch.cat([before, real], 1)[:, None, None].repeat(1, 1, new, 1)
        visible[..., -new:] &= torch.ones(new, new, dtype=torch.bool, device=k.device).tril()
        read = F.scaled_dot_product_attention(q[:, :, -new:], k, v, visible, scale=scale, enable_gqa=True)
        # In rows with fewer of them, the first of these queries are the prompt's own.
        behind = torch.arange(new, device=k.device) >= new - uploaded(flow.tails, k.device)[:, None]
        late = torch.where(behind[..., None, None], read.transpose(1, 2), out[0][:, -new:])
        return torch.cat([out[0][:, :-new], late], 1), *out[1:]

    def finish(self, flow: PrefillState) -> None:
        """Commits the slots of every layer to the flow's records, and the decisions to its trace."""
        pending_slots: dict[int, SlotMap] = {}
        last: Any = None
        for k, shrunk in sorted(flow.shrunk.items()):
            now = (shrunk.group, shrunk.rows)
            if now != last or k in flow.pending_slots:
                dense = flow.cache.groups[flow.cache.group(k)].dense
                pending_slots[k] = slots_of(flow.pending_slots[shrunk.group], shrunk.rows, dense)
            last = now
            flow.trace.stages.append(shrunk.trace(self.stage, k))
            flow.trace.cached.append([row.stay for row in shrunk.rows])
        flow.pending_slots.update(pending_slots)


def heads_of(x: Tensor, heads: int) -> list[slice]:
    """Where each row's heads are among those of x [rows * heads, ...]."""
    return [slice(start, start + heads) for start in range(0, len(x), heads)]


def apply(stage: CacheStage, decision: Decision | None, keys: Tensor, values: Tensor) -> Piece:
    """Keys and values [Hk, C, d] of a row after the decision.

    Raises:
        ValueError: it does not fit.
    """
    if decision is None:
        return Plain(keys, values)
    if isinstance(decision, QuantizedKV) and decision.shape == keys.shape:
        return decision
    if isinstance(decision, HeadClasses):
        raise ValueError(f"stage {stage.name} puts heads in classes and does not say so: in_classes must be True")
    if isinstance(decision, KeepSlots):
        new = decision.apply(keys, values)
    else:
        new = decision.keys, decision.values
    heads, n, width = keys.shape
    for t in new:
        if (
            t.ndim != 3
            or (t.shape[0], t.shape[2]) != (heads, width)
            or not 0 < t.shape[1] <= n
            or t.shape[1] != new[0].shape[1]
        ):
            raise ValueError(
                f"stage {stage.name} left keys and values of shapes {[tuple(t.shape) for t in new]} of "
                f"{tuple(keys.shape)}; every head must hold the same 1 to {n} tokens"
            )
    return Plain(*new)
