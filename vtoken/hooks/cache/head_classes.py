"""Key heads in classes: what each class holds of a prompt, and attention class by class from then on.

The first prefill with pictures attends as the model does, and then every class keeps its own tokens. Later forwards
attend once per class. In a turn with pictures, new tokens see what is left and each other; in a decode step, a text
turn or a draft, every token sees what its window holds, as if tokens came one by one. A row that was given no pictures
yet holds everything, as it would alone.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from vtoken.hooks.cache.cached_rows import prompt_in
from vtoken.hooks.cache.class_attention import read
from vtoken.hooks.cache.class_rows import split
from vtoken.hooks.cache.layer_for_stage import layer_for
from vtoken.hooks.cache.shrink import CacheShrinker, tail_mask, with_tails
from vtoken.hooks.cache.shrunk_layer import ShrunkLayer
from vtoken.hooks.decoder.attention_tap import AttentionCall
from vtoken.hooks.state.classed_layer import ClassedLayer, adopt
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.head_class import HeadClass
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows
from vtoken.hooks.state.run import Clock
from vtoken.stages import Stage, uploaded
from vtoken.stages.cache import CacheStage, Decision, HeadClasses


class HeadSplitter(CacheShrinker):
    """A tap on every decoder layer with attention."""

    def __init__(self, context: Context, stage: CacheStage) -> None:
        super().__init__(context, stage)
        self.goes_on, self.thinning = True, context.at("attention")

    def _tap(self, call: AttentionCall) -> Any:
        flow, cached = self.run.flow, None if self.run.cache is None else self.run.cache.layers[call.layer]
        prefill = isinstance(flow, PrefillState)
        splits, before = prefill and flow.skip_reason is None, None
        if not isinstance(cached, ClassedLayer):
            out = call.original()
        else:
            before, q, mask = cached.classes, call.q, None if flow is None else flow.key_mask
            cached.take(None if mask is None else mask[:, -q.shape[2] :].bool().to(q.device), slides=not splits)
            free = uploaded([_acts(flow, r) for r in range(len(q))], q.device, torch.bool) if splits else None
            out = read(cached, q, call.scale, call.attend, free), None
            for other in self.thinning if splits else ():
                flow.skip(other, f"the cache holds {flow.past} tokens already, and heads in classes of them")
        if splits:
            return self._split(flow, call, out, before)
        if prefill:
            flow.skip(self.stage, flow.skip_reason)
        return out

    def _split(self, flow: PrefillState, call: AttentionCall, out: Any, before: tuple[HeadClass, ...] | None) -> Any:
        """Leaves every class its tokens of the prompt; `before`: the classes of earlier turns, None: none yet."""
        rows, k = prompt_rows(flow), call.k
        with Clock(k.device) as clock:
            fresh = _fresh(before, len(rows))
            decisions = [self._decide(flow, call, r, None if fresh[r] else before) for r in range(len(rows))]
            changed = before is not None or any(d and changes(d, rows[r].prompt) for r, d in enumerate(decisions))
            classes = split(flow, rows, decisions, k, call.v, before, fresh) if changed else ()
        stay = [row.prompt if d is None else _mean(d) for row, d in zip(rows, decisions, strict=True)]
        left = tuple(replace(row, stay=n) for row, n in zip(rows, stay, strict=True))
        flow.shrunk[call.layer] = ShrunkLayer(flow.group, left, tuple(decisions), True, flow.live, clock)
        if not changed:
            return out
        cached = flow.cache.layers[call.layer]
        cached = adopt(cached, classes, k.shape[2] if before is None else cached.total)
        if not any(flow.tails):
            return out
        # What follows the prompt in this forward (drafts, an answer) reads what is left of it, as it would in a forward
        # of its own.
        new, behind = max(flow.tails), tail_mask(flow, k.device)
        cached.pending = k[:, :, -new:], call.v[:, :, -new:]
        cached.take(None if len(set(flow.tails)) == 1 else behind)
        return with_tails(out, read(cached, call.q[:, :, -new:], call.scale), behind)

    def _decide(
        self, flow: PrefillState, call: AttentionCall, r: int, before: tuple[HeadClass, ...] | None
    ) -> HeadClasses | None:
        """The stage's decision about one row; None where it does not act."""
        row = prompt_rows(flow)[r]
        here = prompt_in(row, call.k.shape[2])
        keys, values = call.k[r, :, here], call.v[r, :, here]
        layer = layer_for(self.stage, self.context, flow, call, slice(r, r + 1), keys, values)
        if layer is None:
            return None
        if before is not None:
            layer = replace(layer, classes=tuple(each.heads[r] for each in before))
        with torch.no_grad():
            return checked(self.stage, self.compress(layer), len(keys), row.prompt)

    def finish(self, flow: PrefillState) -> None:
        """Enters the decisions into the trace. Slots of a layer stay those of a cache that holds everything."""
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


def changes(decision: HeadClasses, prompt: int) -> bool:
    """Whether any of the `prompt` tokens leaves a head, now or once a window slides."""
    kept = [each.stay.shape[1] + each.latest.shape[1] for each in decision.classes]
    return any(n < prompt for n in kept) or any(each.window is not None for each in decision.classes)


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
                f"stage {stage.name} chose slots of shapes {shapes} for {len(each.heads)} heads of {prompt} tokens; "
                "they must be [heads or 1, tokens]"
            )
        if each.compensated and any(s[0] != 1 for s in shapes):
            raise ValueError(f"stage {stage.name}: heads that share what stands for what left must hold the same slots")
    return decision
