"""Virtual unmerging: the decoder runs on merged tokens, and its attention sees each of them at every place of its
members.

Attention modules are called with cos 1 and sin 0, so that the q, k and v that reach their attention function carry no
RoPE. There (`UnmergedAttention`) they are copied to the places of the members and rotated by the positions of these
places; after attention, the outputs of a token's places are averaged, before o_proj. No attention forward is copied,
and decode steps on an expanded cache run the stock code.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicLayer

from vtoken.errors import UnsupportedError
from vtoken.hooks.attention.unmerged_attention import Rope, UnmergedAttention, UnmergeTable, attend
from vtoken.hooks.decoder.attention_tap import HANDED, tap
from vtoken.hooks.decoder.rotation import BUILT, rotates_last
from vtoken.hooks.state.cache_argument import CACHE, causal_mask
from vtoken.hooks.state.checkpointing import check_replay, replays
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState, eager, steps
from vtoken.hooks.state.left_padding import left_pad, take
from vtoken.hooks.state.live_tokens import trace_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.pruned_cache import PrunedCache
from vtoken.hooks.state.run import Clock
from vtoken.stages import Stage, offsets_of

NOTHING = "no stage before it merged anything"


class Unmerge:
    """Hooks on the decoder layers, and the tap of their attention.

    Args:
        stage: the one that asks for it; its `unmerge_mode()` says what the KV cache shall hold.

    Raises:
        UnsupportedError: an attention that is not built as Llama's and Qwen's are.
    """

    def __init__(self, context: Context, stage: Stage) -> None:
        self.lm, self.run, self.stage, self.mrope = context.lm, context.run, stage, context.adapter.mrope
        self.expanded = stage.unmerge_mode() == "expanded"
        for layer in self.lm.layers:
            if not rotates_last(layer.self_attn):
                raise UnsupportedError(
                    f"stage {stage.name} cannot unmerge tokens in {type(layer.self_attn).__name__}: it is not {BUILT}; "
                    "leave the stage out, merged tokens then attend at one place each"
                )
            context.handle.before(layer, self._layer)
        tap(context.handle, self.lm, range(context.depth), attend)

    def _layer(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return None if steps(hidden, kwargs.get(CACHE)) else self._hand(module, args, kwargs)

    @eager
    def _hand(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        unmerged = getattr(self.run.flow, "unmerged", None)
        if unmerged is None:
            return None
        check_replay(module)
        cos, sin = kwargs["position_embeddings"]
        cache = kwargs.get(CACHE) if self.expanded else None
        if cache is not None:
            kwargs = {**kwargs, CACHE: None}
            # A checkpointed layer runs twice and would write twice; upstream drops the cache then, too.
            cache = None if replays(module) else cache
        unrotated = (torch.ones_like(cos), torch.zeros_like(sin))
        new = {"position_embeddings": unrotated, "attention_mask": unmerged.mask, HANDED: (unmerged, cache)}
        return args, {**kwargs, **new}

    def prefill(self, flow: PrefillState) -> None:
        """Spreads the tokens of a prefill whose layout is settled, and writes the stage's entry of the trace.

        Raises:
            UnsupportedError: images whose merged tokens the model interpolated.
        """
        v = flow.live
        if any(encode.places_unknown for encode in flow.spans.encodes):
            raise UnsupportedError(
                f"stage {self.stage.name} cannot tell which places a merged token stands for: this model interpolates "
                "its features (videos, large images) after the encoder, where they were merged; merge with a stage of "
                "site tokens"
            )
        with Clock(v.batch_row.device) as clock:
            if v.history.slot is not None or past_table(flow) is not None:
                self._open(flow)
        entry = trace_of(self.stage, v.lengths, v.history, clock, None)
        flow.trace.stages.append(replace(entry, stood_aside=NOTHING if v.history.slot is None else None))

    def go_on(self, flow: ForwardState) -> None:
        """A decode step, a text turn or a draft on a cache of merged keys. An expanded cache needs nothing."""
        if past_table(flow) is None:
            return
        rope = self._rope(flow, flow.positions)
        slot = torch.arange(flow.new.shape[1], device=flow.new.device).expand(len(flow.new), -1)
        flow.unmerged = self._merged(flow, slot, slot, flow.valid, flow.dense, rope, None)

    def _open(self, flow: PrefillState) -> None:
        columns, valid, slot, counts = places(flow)
        wide = replace(flow, index=columns, valid=valid, counts=counts)
        rope = self._rope(flow, take(flow.positions, columns, -1))
        absorbed_by = slot.masked_fill(~valid, flow.index.shape[1])
        if not self.expanded and flow.cache is not None:
            flow.unmerged = self._merged(flow, columns, slot, valid, wide.dense, rope, absorbed_by)
            return
        key_mask, new = wide.enter(0), columns.shape[1]
        mask = self._mask(flow, new, wide.slots - new, key_mask)
        flow.unmerged = UnmergedAttention(mask, flow.index.shape[1], rope, absorbed_by)

    def _merged(
        self,
        flow: ForwardState,
        columns: Tensor,
        slot: Tensor,
        valid: Tensor,
        dense: bool,
        rope: Rope,
        source: Tensor | None,
    ) -> UnmergedAttention:
        """Extends the table of a cache of merged keys without RoPE by places [B, U] of these columns and new slots.
        `source`: as in UnmergedAttention.

        Raises:
            UnsupportedError: a static cache.
        """
        cache, new, past = flow.cache, flow.index.shape[1], flow.slots - flow.index.shape[1]
        if cache.is_compileable:
            raise UnsupportedError(
                f"stage {self.stage.name} with cache: merged keeps a table that grows with every token; use a dynamic "
                "cache (cache_implementation=None), or cache: expanded"
            )
        old = past_table(flow)
        if old is None:
            old = UnmergeTable.rotated(flow.cached_rows(0)[0], cache.groups[0].dense, rope)
        key_mask = torch.cat([flow.unmasked(old.logical), valid.to(old.logical.device)], 1)
        logical = torch.where(valid, columns + flow.past, -1)
        cache.table = table = old.extend(
            logical, past + slot.clamp(0, new - 1), rope, flow.past + flow.new.shape[1], dense
        )
        # The device is asked only when nothing but the user's mask can tell.
        full = table.dense and (flow.mask is None or bool(key_mask.all()))
        mask = self._mask(flow, columns.shape[1], old.logical.shape[1], None if full else key_mask.long())
        return UnmergedAttention(mask, new, rope, source, (table.slot, table.rope))

    def _rope(self, flow: ForwardState, positions: Tensor) -> Rope:
        if self.mrope:
            # A fourth axis in front numbers the tokens for the mask.
            positions = positions.expand(3, *positions.shape) if positions.ndim == 2 else positions[-3:]
        cos, sin = self.lm.rotary_emb(flow.hidden, position_ids=positions.to(flow.hidden.device))
        return cos.expand(len(flow.new), -1, -1), sin.expand(len(flow.new), -1, -1)

    def _mask(self, flow: ForwardState, new: int, past: int, key_mask: Tensor | None) -> Any:
        """The backend's mask for so many new places after so many cached ones."""
        like = flow.hidden[:, :1].expand(-1, new, -1)
        if flow.cache is None:
            view = None
        elif flow.cache.is_compileable:
            view = Cache(layers=[flow.cache.layers[0]])
        else:
            places = DynamicLayer()
            places.keys = places.values = like[:, None, :1, :1].expand(-1, -1, past, -1)
            places.is_initialized = True
            view = Cache(layers=[places])
        return causal_mask(self.lm.config, like, key_mask, view)


def places(flow: PrefillState) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Where the live tokens of a prefill and the members of the merged ones stand.

    Returns:
        columns [B, U] of the prompt, rows packed to the left; valid [B, U], which of them are real; slot [B, U] of the
        token in the current layout that stands there (anything at padding); how many there are per row.
    """
    start, absorbed_by = flow.raster, flow.live.history.absorbed_by
    rank, alive = flow.alive.cumsum(1), flow.alive.clone()
    slot = rank - rank[:, -1:] + flow.index.shape[1] - 1
    if absorbed_by is not None:
        first = offsets_of(start.lengths, absorbed_by.device)[:-1][start.image]
        target = start.column[(first + absorbed_by).clamp(min=0)]
        alive[start.batch_row, start.column] = absorbed_by >= 0
        slot[start.batch_row, start.column] = slot[start.batch_row, target]
    counts = alive.sum(1).tolist()
    columns = left_pad(alive, max(counts))
    return columns, alive.gather(1, columns), slot.gather(1, columns), counts


def past_table(flow: ForwardState) -> UnmergeTable | None:
    """What the cached keys without RoPE stand for; None if nothing is cached, or keys of the stock model."""
    table = flow.cache.table if isinstance(flow.cache, PrunedCache) and flow.past else None
    # A forward that failed, or drafts that were rejected, may have left entries behind.
    return None if table is None else table.cut(flow.past)
