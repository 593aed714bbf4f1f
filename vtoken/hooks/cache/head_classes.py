"""Key heads in classes: what each holds of a prompt, and attention class by class from then on.

A prefill attends as the model does, and then every class keeps its own tokens. Later forwards attend once per class. In
a turn with pictures, new tokens see what is left and each other; in a decode step, a text turn or a draft, every token
sees what its window holds, as if tokens came one by one. A row that was given no pictures yet holds everything, as it
does alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.cache.cached_rows import PromptRow, joined
from vtoken.hooks.cache.class_attention import read
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.cache.shrunk_layer import ShrunkLayer
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.classed_layer import ClassedLayer, adopt
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.head_class import HeadClass, Lost
from vtoken.hooks.state.left_padding import left_padded
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows
from vtoken.hooks.state.run import Clock
from vtoken.stages import Stage, uploaded
from vtoken.stages.cache import CacheStage, Decision, HeadClasses, HeldHeads

Pieces = list[tuple[Tensor, Tensor]]  # of every row keys and values [Hc, n, d]


class HeadSplitter(CacheShrinker):
    """A tap on every decoder layer with attention, and a pre-hook that sees the cache."""

    def __init__(self, context: Context, stage: CacheStage) -> None:
        super().__init__(context, stage)
        self.goes_on = True
        for k in self.attending:
            context.handle.before(self.lm.layers[k].self_attn, self._look)

    @eager
    def _look(self, module: Any, args: tuple, kwargs: dict) -> None:
        layers: Sequence[Any] = getattr(kwargs.get(CACHE), "layers", ())
        cached = layers[module.layer_idx] if len(layers) > module.layer_idx else None
        self.run.due = cached if isinstance(cached, ClassedLayer) else None

    def _tap(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        return self._attend(module, q, k, v, original, kwargs.get("scaling") or k.shape[-1] ** -0.5)

    @eager
    def _attend(self, module: Any, q: Tensor, k: Tensor, v: Tensor, original: Callable[..., Any], scale: float) -> Any:
        cached, self.run.due = self.run.due, None
        flow, before = self.run.flow, None if cached is None else cached.classes
        prefill = isinstance(flow, PrefillState)
        splits = prefill and flow.skip_reason is None
        if cached is None:
            out = original()
        else:
            mask = None if flow is None else flow.key_mask
            cached.take(None if mask is None else mask[:, -q.shape[2] :].bool().to(k.device), slides=not splits)
            free = uploaded([_acts(flow, r) for r in range(len(q))], q.device, torch.bool) if splits else None
            out = read(cached, q, scale, original, free), None
        if splits:
            return self._split(flow, module, q, k, v, scale, out, before)
        if prefill:
            flow.skip(self.stage, flow.skip_reason)
        return out

    def _split(
        self,
        flow: PrefillState,
        module: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        out: Any,
        before: tuple[HeadClass, ...] | None,
    ) -> Any:
        number, rows = module.layer_idx, prompt_rows(flow)
        decisions: list[HeadClasses | None] = []
        fresh = _fresh(before, len(rows))
        with Clock(k.device) as clock:
            for r, row in enumerate(rows):
                begin = k.shape[2] - row.prompt - row.tail
                here = slice(begin, begin + row.prompt)
                seen = self.told(flow, module, slice(r, r + 1), k[r, :, here], v[r, :, here], q, scale)
                if seen is not None and before is not None and not fresh[r]:
                    seen = replace(seen, classes=tuple(each.heads[r] for each in before))
                with torch.no_grad():
                    decision = None if seen is None else self.compress(seen)
                decisions.append(None if decision is None else checked(self.stage, decision, k.shape[1], row.prompt))
            held = [row.prompt if d is None else _mean(d) for row, d in zip(rows, decisions, strict=True)]
            whole = held == [row.prompt for row in rows] and not any(d and _leaves(d) for d in decisions)
            if before is not None or not whole:
                classes = _classes(flow, rows, decisions, k, v, before, fresh)
        shown = tuple(replace(row, stay=n) for row, n in zip(rows, held, strict=True))
        flow.shrunk[number] = ShrunkLayer(flow.group, shown, tuple(decisions), True, flow.live, clock)
        if before is None and whole:
            return out
        cached = flow.cache.layers[number]
        total = cached.total if before is not None else k.shape[2]
        cached = adopt(cached, classes, total)
        return self._answer(flow, cached, q, k, v, scale, out) if any(flow.tails) else out

    def _answer(
        self, flow: PrefillState, cached: ClassedLayer, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Any
    ) -> Any:
        """What follows the prompt in this forward (drafts, an answer) reads what is left of it, as it would in a
        forward of its own."""
        new = max(flow.tails)
        real = torch.arange(new, device=k.device) >= new - uploaded(flow.tails, k.device)[:, None]
        cached.pending = k[:, :, -new:], v[:, :, -new:]
        cached.take(None if len(set(flow.tails)) == 1 else real)
        late = torch.where(real[..., None, None], read(cached, q[:, :, -new:], scale), out[0][:, -new:])
        return torch.cat([out[0][:, :-new], late], 1), *out[1:]

    def finish(self, flow: PrefillState) -> None:
        """Enters the decisions into the trace. The slots of every layer are those of a cache that holds everything."""
        for k, shrunk in sorted(flow.shrunk.items()):
            flow.trace.stages.append(shrunk.trace(self.stage, k))
            flow.trace.cached.append([row.stay for row in shrunk.rows])


def _acts(flow: PrefillState, row: int) -> bool:
    """Whether a stage decides about this row of a prefill."""
    return row not in flow.skipped and any(prompt_rows(flow)[row].slots)


def _fresh(before: tuple[HeadClass, ...] | None, rows: int) -> list[bool]:
    """Rows about which nothing was decided yet; asks the device in a later turn if there were any."""
    if before is None:
        return [True] * rows
    exempt = before[0].exempt
    return [False] * rows if exempt is None else exempt.tolist()


def _mean(decision: HeadClasses) -> int:
    """Tokens that a head holds, on average."""
    heads = [len(each.heads) for each in decision.classes]
    tokens = [each.stay.shape[-1] + each.latest.shape[-1] for each in decision.classes]
    return round(sum(h * n for h, n in zip(heads, tokens, strict=True)) / sum(heads))


def _leaves(decision: HeadClasses) -> bool:
    """Whether anything will leave."""
    return any(each.window is not None for each in decision.classes)


def _classes(
    flow: PrefillState,
    rows: Sequence[PromptRow],
    decisions: Sequence[HeadClasses | None],
    k: Tensor,
    v: Tensor,
    before: tuple[HeadClass, ...] | None,
    fresh: Sequence[bool],
) -> tuple[HeadClass, ...]:
    """What the classes of a layer hold once the prompt is read.

    Args:
        fresh: rows that were given no pictures before.
        k, v: [B, Hk, S, d], which end in what is new. In front of that stands what earlier turns left, where nothing is
            in classes yet: it stays for good.
    """
    width = flow.index.shape[1]
    new = slice(k.shape[2] - width, k.shape[2])
    exempt = [first and d is None for first, d in zip(fresh, decisions, strict=True)]
    if before is None:
        first = next(d for d in decisions if d is not None)
        past = None if flow.key_mask is None else flow.key_mask[:, : new.start].bool().to(k.device)
        before = tuple(_empty(each, decisions, c, k, v, new.start, past) for c, each in enumerate(first.classes))
    out = []
    for c, old in enumerate(before):
        keys, values = (old.own(t[:, :, new]) for t in (k, v))
        fixed, latest = Pieces(), Pieces()
        gone = torch.zeros(len(k), width, dtype=torch.bool, device=k.device)
        for r, (row, decision) in enumerate(zip(rows, decisions, strict=True)):
            begin = width - row.prompt - row.tail
            x, y = (t[r, :, begin : begin + row.prompt] for t in (keys, values))
            stays, leaves = _parts(old, r)
            if decision is None:
                fixed.append(stays)
                latest.append(_behind(leaves, (x, y)))
                continue
            if fresh[r]:  # what was there before any picture stays
                stays, leaves = _behind(stays, leaves), (x[:, :0], y[:, :0])
            mine = decision.classes[c]
            fixed.append(_behind(stays, _chosen(x, y, mine.stay)))
            latest.append(_behind(leaves, _chosen(x, y, mine.latest)))
            if old.lost is not None:
                gone[r, begin : begin + row.prompt] = True
                for index in (mine.stay, mine.latest):
                    gone[r].index_fill_(0, index[0] + begin, False)
        lost = old.lost and old.lost.more(keys, values, gone)
        (fixed_keys, fixed_values, real), (keys, values, late) = _padded(fixed), _padded(latest)
        both = torch.cat([real, late], 1)
        padded = len({x.shape[1] for x, _ in fixed}) > 1 or len({x.shape[1] for x, _ in latest}) > 1
        held = replace(
            old,
            keys=torch.cat([fixed_keys, keys], 2),
            values=torch.cat([fixed_values, values], 2),
            fixed=fixed_keys.shape[2],
            real=both if padded else None,
            exempt=uploaded(exempt, k.device, torch.bool) if any(exempt) else None,
            lost=lost,
        )
        out.append(held if held.window is None else held.trimmed(held.window))
    return tuple(out)


def _empty(
    like: HeldHeads,
    decisions: Sequence[HeadClasses | None],
    c: int,
    k: Tensor,
    v: Tensor,
    past: int,
    real: Tensor | None,
) -> HeadClass:
    """The class of that number before the prompt, with what earlier turns left."""
    heads = torch.stack([like.heads if d is None else d.classes[c].heads for d in decisions]).to(k.device)
    held = HeadClass(heads, k[:, : len(like.heads), :past], v[:, : len(like.heads), :past], past, like.window)
    keys, values = held.own(k[:, :, :past]), held.own(v[:, :, :past])
    lost = Lost.nothing(keys, values) if like.compensated else None
    return replace(held, keys=keys, values=values, real=real if past else None, lost=lost)


def _parts(held: HeadClass, row: int) -> Pieces:
    """What a row of a class holds for good, and for now, without padding."""
    out: Pieces = []
    for part in (slice(0, held.fixed), slice(held.fixed, held.length)):
        keys, values = held.keys[row, :, part], held.values[row, :, part]
        if held.real is not None:
            real = held.real[row, part]
            keys, values = keys[:, real], values[:, real]
        out.append((keys, values))
    return out


def _chosen(keys: Tensor, values: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [Hc, n, d] at these slots [Hc or 1, n]."""
    at = index[..., None].expand(len(keys), -1, -1)
    return keys.gather(1, at.expand(-1, -1, keys.shape[2])), values.gather(1, at.expand(-1, -1, values.shape[2]))


def _behind(first: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return joined([first[0], then[0]], 1), joined([first[1], then[1]], 1)


def _padded(rows: Pieces) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, Hc, n, d] of all rows, padded on the left, and [B, n] which of them are no padding."""
    keys, values = (left_padded([row[side] for row in rows]) for side in (0, 1))
    lengths = uploaded([row[0].shape[1] for row in rows], keys.device)
    return keys, values, torch.arange(keys.shape[2], device=keys.device) >= keys.shape[2] - lengths[:, None]


def checked(stage: Stage, decision: Decision, heads: int, prompt: int) -> HeadClasses:
    """The decision, if it fits its layer.

    Raises:
        ValueError: it does not; names the stage.
    """
    if not isinstance(decision, HeadClasses):
        raise ValueError(f"stage {stage.name} says in_classes and decided with {type(decision).__name__}")
    counts = [len(each.heads) for each in decision.classes]
    if sum(counts) != heads:
        raise ValueError(
            f"stage {stage.name} put {sum(counts)} key heads in classes; every one of {heads} must be in one"
        )
    for each in decision.classes:
        shapes = [tuple(index.shape) for index in (each.stay, each.latest)]
        if any(len(s) != 2 or s[0] not in (1, len(each.heads)) or s[1] > prompt for s in shapes):
            raise ValueError(
                f"stage {stage.name} chose slots of shapes {shapes} for {len(each.heads)} heads of {prompt} tokens; they "
                "must be [heads or 1, tokens]"
            )
        if each.compensated and any(s[0] != 1 for s in shapes):
            raise ValueError(f"stage {stage.name}: heads that share what stands for what left must hold the same slots")
    return decision
