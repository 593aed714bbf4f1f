"""The KV cache is shrunk as the prefill fills it, layer by layer.

Once a layer has attended, nothing of this prefill reads its keys and values any more, so what the stage does not keep
is freed at once. Rows are padded on the left to the longest. Logical lengths do not change (pruned_cache.py);
layers that are left with different numbers of tokens become layer groups of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from vtoken.errors import OtherModelError, UnsupportedError
from vtoken.hooks.cache.cached_rows import PromptRow, prompt_in, slots_of, store
from vtoken.hooks.cache.layer_for_stage import layer_for
from vtoken.hooks.cache.requantize import Requantizer
from vtoken.hooks.cache.shrunk_layer import ShrunkLayer
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.decoder.rotation import check_undone, watch_inputs
from vtoken.hooks.state.checkpointing import replays
from vtoken.hooks.state.classed_layer import ClassedLayer
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.layer_kinds import heads_in, other_kinds
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows
from vtoken.hooks.state.pruned_cache import SlotMap
from vtoken.hooks.state.quantized_layer import Piece, Plain, QuantizedLayer
from vtoken.hooks.state.run import Clock
from vtoken.stages import Stage, uploaded
from vtoken.stages.cache import CacheStage, Decision, HeadClasses, KeepSlots, ReplacedKV
from vtoken.stages.quantized import QuantizedKV


class CacheShrinker:
    """A tap on every decoder layer with attention; the others keep a state of fixed size, which does not shrink.

    Attributes:
        goes_on: it acts at decode steps too.

    Raises:
        UnsupportedError: the stage cannot run on this model.
    """

    def __init__(self, context: Context, stage: CacheStage) -> None:
        self.context, self.run, self.stage, self.goes_on = context, context.run, stage, bool(stage.requantize_every())
        if why := stage.heads_incompatibility(*heads_in(context.lm.config)):
            raise OtherModelError(f"stage {stage.name}: {why}")
        try:
            self.compress = stage.compressor(context.adapter.model)
        except (ImportError, ValueError) as error:
            raise UnsupportedError(str(error)) from error
        tap(context.handle, context.lm, context.attending, self._tap)
        if self.goes_on:
            Requantizer(context, stage)
        for k in context.attending if stage.rope else ():
            check_undone(stage, context.lm.layers[k].self_attn)
        if stage.native or stage.rope:
            watch_inputs(context, context.attending)

    def check(self, cache: Any) -> None:
        """Refuses a prefill with images whose cache cannot shrink.

        Raises:
            UnsupportedError: says why, and what to do.
        """
        name = self.stage.name
        if replays(self.context.lm.layers[0]):
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
        if odd := other_kinds(cache, self.context.attending, (DynamicLayer, QuantizedLayer, ClassedLayer)):
            raise UnsupportedError(f"stage {name} cannot shrink cache layers of kind {odd}; use a plain DynamicCache")

    def _tap(self, call: AttentionCall) -> Any:
        out, flow = call.original(), self.run.flow
        if not isinstance(flow, PrefillState):
            return out
        if flow.skip_reason is None:
            return self._shrink(flow, call, out)
        flow.skip(self.stage, flow.skip_reason)
        return out

    def _shrink(self, flow: PrefillState, call: AttentionCall, out: Any) -> Any:
        k, v, width = call.k, call.v, flow.index.shape[1]
        rows, kept, parts, known, same = [], [], [], True, True
        with Clock(k.device) as clock:
            for turn in self._turns(flow, call.layer):
                row = prompt_rows(flow)[turn.start]
                here = prompt_in(row, k.shape[2])
                x, y = k[turn, :, here].flatten(0, 1), v[turn, :, here].flatten(0, 1)
                decision: Decision | None = None
                layer = layer_for(self.stage, self.context, flow, call, turn, x, y)
                if layer is not None:
                    with torch.no_grad():
                        decision = self.compress(layer)
                    same = same and isinstance(decision, KeepSlots) and decision.index.shape[1] == row.prompt
                    known = known and not isinstance(decision, ReplacedKV)
                piece = apply(self.stage, decision, x, y)
                counts = row.counts if decision is None else getattr(decision, "counts", None)
                index = decision.index if isinstance(decision, KeepSlots) else None
                for i, r in enumerate(range(turn.start, turn.stop)):
                    heads = slice(i * k.shape[1], (i + 1) * k.shape[1])
                    rows.append(replace(prompt_rows(flow)[r], stay=piece.length, counts=counts))
                    kept.append(None if index is None else index[heads])
                    mine = Plain(piece.keys[heads], piece.values[heads]) if isinstance(piece, Plain) else piece
                    parts.append((mine, Plain(k[r, :, here.stop :], v[r, :, here.stop :])))
        flow.shrunk[call.layer] = ShrunkLayer(flow.group, tuple(rows), tuple(kept), known, flow.live, clock)
        if same:
            return out
        cached = store(flow.cache.layers[call.layer], parts, k, v, width)
        if not any(flow.tails):
            return out
        return _tails_again(flow, rows, k.shape[2] - width, call, (cached.keys, cached.values), out)

    def _turns(self, flow: PrefillState, layer: int) -> list[slice]:
        """The rows that are decided together: each by itself; or, where they are alike, all at once as more heads of
        one row."""
        rows, found = prompt_rows(flow), flow.notes.query_attention
        alike = all((row.prompt, row.tail, row.slots) == (rows[0].prompt, rows[0].tail, rows[0].slots) for row in rows)
        if self.stage.by_head and alike and not flow.skipped and not any((layer, r) in found for r in range(len(rows))):
            return [slice(0, len(rows))]
        return [slice(r, r + 1) for r in range(len(rows))]

    def finish(self, flow: PrefillState) -> None:
        """Records the slots that every layer is left with, and enters the decisions into the trace."""
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


def check_cache(stages: Sequence[Stage]) -> None:
    """Refuses stages that cannot shrink a KV cache, and more than one stage that does.

    Raises:
        UnsupportedError: names the stages.
    """
    for stage in stages:
        if not isinstance(stage, CacheStage):
            raise UnsupportedError(
                f"stage {stage.name} acts at site 'cache' and has no compress(); derive it from "
                "vtoken.stages.CacheStage"
            )
    if len(stages) > 1:
        raise UnsupportedError(
            f"stages {' and '.join(s.name for s in stages)} both act at site 'cache': after the first, heads hold "
            "different tokens, and a second cannot tell text from image; keep one of them"
        )


def _tails_again(
    flow: PrefillState, rows: list[PromptRow], past: int, call: AttentionCall, kv: tuple[Tensor, Tensor], out: Any
) -> Any:
    """The output of attention, with the tail (drafts, an answer) attending to what is left of the prompt, as it would
    in a forward of its own.

    Args:
        past: slots of earlier turns; kv: keys and values [B, Hk, S, d] that are left.
    """
    (k, v), new = kv, max(flow.tails)
    slots = k.shape[2] - past
    length = uploaded([row.stay + row.tail for row in rows], k.device)
    real = torch.arange(slots, device=k.device) >= slots - length[:, None]
    before = real.new_ones(len(k), past) if flow.key_mask is None else flow.key_mask[:, :past].bool().to(k.device)
    visible = torch.cat([before, real], 1)[:, None, None].repeat(1, 1, new, 1)
    visible[..., -new:] &= torch.ones(new, new, dtype=torch.bool, device=k.device).tril()
    q = call.q[:, :, -new:]
    read = F.scaled_dot_product_attention(q, k, v, visible, scale=call.scale, enable_gqa=True)
    return with_tails(out, read.transpose(1, 2), tail_mask(flow, k.device))


def tail_mask(flow: PrefillState, device: torch.device) -> Tensor:
    """[B, n] which of the newest n slots belong to the tail of their row; n is the longest tail."""
    new = max(flow.tails)
    return torch.arange(new, device=device) >= new - uploaded(flow.tails, device)[:, None]


def with_tails(out: Any, read: Tensor, behind: Tensor) -> Any:
    """The output of attention with `read` [B, n, H, d] for the newest n queries, where `behind` [B, n] is True;
    the other queries belong to the prompt and keep their output."""
    new = read.shape[1]
    late = torch.where(behind[..., None, None], read, out[0][:, -new:])
    return torch.cat([out[0][:, :-new], late], 1), *out[1:]


def apply(stage: CacheStage, decision: Decision | None, keys: Tensor, values: Tensor) -> Piece:
    """Keys and values [Hk, C, d] of a row after the decision.

    Raises:
        ValueError: the decision does not fit the layer.
    """
    if decision is None:
        return Plain(keys, values)
    if isinstance(decision, QuantizedKV) and decision.shape == keys.shape:
        return decision
    if isinstance(decision, HeadClasses):
        raise ValueError(f"stage {stage.name} puts heads in classes and does not say so: in_classes must be True")
    new = decision.apply(keys, values) if isinstance(decision, KeepSlots) else (decision.keys, decision.values)
    heads, n, width = keys.shape
    shapes, left = [tuple(t.shape) for t in new], new[0].shape[1] if new[0].ndim == 3 else 0
    if not 0 < left <= n or shapes != [(heads, left, width)] * 2:
        raise ValueError(
            f"stage {stage.name} left keys and values of shapes {shapes} of {tuple(keys.shape)}; every head must hold "
            f"the same 1 to {n} tokens"
        )
    return Plain(*new)
