"""Sparse prefill: a stage decides which keys are read; projections, RoPE and cache stay the model's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.decoder.attention_tap import AttentionCall, tap
from vtoken.hooks.decoder.rotation import check_undone, rope_of, watch_inputs
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.layer_kinds import heads_in
from vtoken.hooks.state.live_tokens import trace_of
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import query_window, rasters
from vtoken.hooks.state.run import Clock
from vtoken.kernels import block_sparse_attention
from vtoken.kernels._lists import check_singles
from vtoken.stages import Stage, uploaded
from vtoken.stages.attention import DenseSubset, PrefillQK, SparseAttention, SparseMask, everything
from vtoken.stages.query_attention import QueryAttention

SIZE = 128  # tokens of a block, where queries read everything
MAPS = 4 << 30  # bytes that the maps of blocks of one layer may take
WIDEST = 256  # head width that the kernel takes


class SparsePrefill:
    """Taps the attention of the decoder layers in which a stage acts; installs nothing without one."""

    def __init__(self, context: Context) -> None:
        self.run, self.cache_stage = context.run, context.cache_stage
        self.at: dict[int, SparseAttention] = {}
        for stage in context.at("attention"):
            if isinstance(stage, SparseAttention):
                self.at |= {k: stage for k in stage.layers(context.depth) if k in context.attending}
        watch_inputs(context, [layer for layer, stage in self.at.items() if stage.rope])
        tap(context.handle, context.lm, self.at, self._tap)

    def _tap(self, call: AttentionCall) -> Any:
        flow, stage, q = self.run.flow, self.at[call.layer], call.q
        if not isinstance(flow, PrefillState):
            return call.original()
        reason = skip_reason(flow, stage, call)
        if reason is not None:
            flow.skip(stage, reason)
            return call.original()
        rows, asides = [_row(x, flow) for x in (q, call.k, call.v)], _skip_reasons(flow, stage)
        with torch.no_grad(), Clock(q.device) as clock:
            chosen = [
                self._choose(stage, flow, row, x, y, call) if asides[row] is None else _whole(x)
                for row, (x, y) in enumerate(zip(*rows[:2], strict=True))
            ]
        trace = trace_of(stage, flow.live.lengths, flow.live.history, clock, call.layer)
        # Counted now: a trace that counts when it is read would keep the maps of all layers in memory (28 heads, 128k
        # tokens: 29 MB each).
        trace.densities, trace.rows_aside = [reads.density() for reads in chosen], asides
        trace.backend = ", ".join(sorted({reads.backend(*qkv) for reads, *qkv in zip(chosen, *rows, strict=True)}))
        flow.trace.stages.append(trace)
        out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], call.v.shape[3])
        for row, (reads, *qkv) in enumerate(zip(chosen, *rows, strict=True)):
            n = flow.counts[row]
            tail = flow.tails[row] if asides[row] is None else 0
            out[row, q.shape[2] - n :] = _attention(reads, qkv, call.scale, tail).transpose(0, 1)
        return out, None

    def _choose(
        self, stage: SparseAttention, flow: PrefillState, row: int, q: Tensor, k: Tensor, call: AttentionCall
    ) -> SparseMask | DenseSubset:
        """What the queries [H, n, d] of one row read of its keys [Hk, n, d]. Drafts and answers after the prompt have
        no say in it."""
        n = q.shape[1] - flow.tails[row]
        image, raster_index, by_row = rasters(flow)
        image, raster_index = (x[row, -q.shape[1] :][:n].to(q.device) for x in (image, raster_index))
        found = QueryAttention(q[:, :n], k[:, :n], call.scale, query_window(flow, self.cache_stage, row))
        if self.cache_stage is not None:
            flow.notes.query_attention[call.layer, row] = found
        rope = None
        if stage.rope:
            start = flow.index.shape[1] - q.shape[1]
            rope = rope_of(flow, call.module, row, slice(start, start + n), q.device)
        prompt = PrefillQK(
            found.q, found.k, call.scale, call.layer, image, raster_index, flow.live.parts, found, rope, by_row[row]
        )
        reads = stage.reads(prompt)
        check(stage, reads, prompt)
        return reads


def skip_reason(flow: PrefillState, stage: SparseAttention, call: AttentionCall) -> str | None:
    """Why the layer keeps the model's own attention in this forward; None: the stage acts."""
    if flow.skip_reason is not None:
        return flow.skip_reason
    if flow.past:
        return f"the cache holds {flow.past} tokens already; only a prompt that comes in one piece is thinned"
    reason = call.skip_reason()
    if reason is not None:
        return reason
    acting = set(flow.live.row) - set(flow.skipped)
    longest = max(n for row, n in enumerate(prompts(flow)) if row in acting)
    if longest < stage.min_len:
        return f"the prompt has {longest} tokens, fewer than min_len {stage.min_len}"
    if flow.notes.left_padded is None:
        flow.notes.left_padded = flow.dense or suffixes(flow)
    return None if flow.notes.left_padded else "the batch is padded on the right; pad it on the left"


def suffixes(flow: PrefillState) -> bool:
    """Whether the real tokens of every row stand at its end. Asks the device."""
    width, counts = flow.valid.shape[1], uploaded(flow.counts, flow.valid.device)[:, None]
    return bool((flow.valid == (torch.arange(width, device=counts.device) >= width - counts)).all())


def _row(x: Tensor, flow: PrefillState) -> list[Tensor]:
    """Per row, [H, n, d] without padding, of the slots of this prefill alone (a static cache has more)."""
    width = flow.index.shape[1]
    return [each[:, width - n : width] for each, n in zip(x, flow.counts, strict=True)]


def _skip_reasons(flow: PrefillState, stage: SparseAttention) -> list[str | None]:
    """Per row, why it reads everything; None where the stage decides."""
    min_tokens, shown, out = max(1, stage.min_len), set(flow.live.row), list[str | None]()
    for row, count in enumerate(prompts(flow)):
        why = None if row in shown else "the row has no image"
        if why is None and count < min_tokens:
            why = f"the row has {count} tokens, fewer than min_len {min_tokens}"
        out.append(flow.skipped.get(row, why))
    return out


def prompts(flow: PrefillState) -> list[int]:
    """Tokens of every row's prompt, without drafts and answers after it."""
    return [count - tail for count, tail in zip(flow.counts, flow.tails, strict=True)]


def _whole(q: Tensor) -> SparseMask:
    """The decision that queries [H, n, d] read everything."""
    n = q.shape[1]
    return SparseMask(SIZE, everything(len(q), n, n, SIZE, q.device))


def _attention(reads: SparseMask | DenseSubset, qkv: Sequence[Tensor], scale: float, tail: int) -> Tensor:
    """[H, n, d] attention of a row. Its prompt reads what was decided; the last `tail` queries, which decoding would
    have added, read everything."""
    q, k, v = qkv
    n = q.shape[1] - tail
    out = reads.apply(q[:, :n], k[:, :n], v[:, :n], scale)
    if not tail:
        return out
    last = everything(len(q), tail, q.shape[1], SIZE, q.device)
    return torch.cat([out, block_sparse_attention(q[:, n:], k, v, last, scale, SIZE)[0]], 1)


def check(stage: SparseAttention, reads: SparseMask | DenseSubset, prompt: PrefillQK) -> None:
    """Refuses a decision that does not fit its prompt.

    Raises:
        ValueError: names the stage.
    """
    if isinstance(reads, DenseSubset):
        if reads.length != prompt.length or not 0 < len(reads.index) <= prompt.length:
            raise ValueError(
                f"stage {stage.name} returned {len(reads.index)} of {reads.length} tokens for a prompt of "
                f"{prompt.length}"
            )
        return
    blocks = -(-prompt.length // reads.size)
    if tuple(reads.blocks.shape) != (prompt.heads, blocks, blocks) or reads.blocks.dtype != torch.bool:
        raise ValueError(
            f"stage {stage.name} returned blocks {reads.blocks.dtype} {tuple(reads.blocks.shape)} for {prompt.heads} "
            f"heads and {prompt.length} tokens in blocks of {reads.size}; it must be bool "
            f"{(prompt.heads, blocks, blocks)}"
        )
    try:
        check_singles(prompt.heads, blocks, reads.columns, reads.share, reads.of)
    except ValueError as error:
        raise ValueError(f"stage {stage.name} returned {error}") from None
    for name, mask, shape in (
        ("dense", reads.dense, (prompt.heads, prompt.length)), ("own", reads.own, (prompt.length,)),
    ):  # fmt: skip
        if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
            raise ValueError(
                f"stage {stage.name} returned {name} {mask.dtype} {tuple(mask.shape)}; it must be bool {shape}"
            )


def check_maps(stage: SparseAttention, config: Any) -> None:
    """Refuses blocks so small that the maps of a layer exceed MAPS for the longest prompt of a decoder. They take a
    bool and an int32 for every head, block of queries and block of keys.

    Raises:
        UnsupportedError: names the stage, and the least size that fits.
    """
    tokens, size = config.max_position_embeddings, getattr(stage, "size", None)

    def taken(size: int) -> int:
        return 5 * config.num_attention_heads * (-(-tokens // size)) ** 2

    if size is not None and taken(size) > MAPS:
        least = next(2**i for i in range(4, 31) if taken(2**i) <= MAPS)
        raise UnsupportedError(
            f"stage {stage.name}: maps of blocks of {size} tokens take {taken(size) / 1e9:.1f} GB a layer for the "
            f"{tokens} tokens that this decoder can be given; set size to {least} or more, or max_position_embeddings "
            "in the model's config to the longest prompt you have"
        )


def check_attention(stages: Sequence[Stage], lm: Any, attending: Sequence[int]) -> None:
    """Refuses stages that no layer can serve, or two for one layer.

    Raises:
        UnsupportedError: names the stages.
    """
    (heads, key_heads, width), depth = heads_in(lm.config), len(lm.layers)
    taken: dict[int, str] = {}
    for stage in stages:
        if not isinstance(stage, SparseAttention):
            raise UnsupportedError(
                f"stage {stage.name} acts at site 'attention' and must derive from "
                "vtoken.stages.attention.SparseAttention"
            )
        if width > WIDEST:
            raise UnsupportedError(f"stage {stage.name}: attention heads of width {width}; at most {WIDEST} are served")
        if why := stage.heads_incompatibility(heads, key_heads, width):
            raise UnsupportedError(f"stage {stage.name}: {why}")
        check_maps(stage, lm.config)
        for k in layers_left(stage, depth, attending):
            if stage.rope:
                check_undone(stage, lm.layers[k].self_attn)
            if k in taken:
                raise UnsupportedError(
                    f"stages {taken[k]} and {stage.name} both thin the attention of decoder layer {k}; share the "
                    "layers out with dense_layers"
                )
            taken[k] = stage.name


def layers_left(stage: SparseAttention, depth: int, attending: Sequence[int]) -> list[int]:
    """Layers in which the stage acts, of those that attend. Refuses `dense_layers` that do not exist or leave none."""
    wrong = [k for k in stage.dense_layers if not -depth <= k < depth]
    layers = [k for k in stage.layers(depth) if k in attending]
    if wrong or not layers:
        raise UnsupportedError(
            f"stage {stage.name}: dense_layers {list(stage.dense_layers)}; this model has layers 0 to {depth - 1}, and "
            "one with attention must be left"
        )
    return layers
