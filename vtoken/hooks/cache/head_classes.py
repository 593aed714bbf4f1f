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

from vtoken.hooks.cache.class_attention import read
from vtoken.hooks.cache.class_rows import split
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.cache.shrunk_layer import ShrunkLayer
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.classed_layer import ClassedLayer, adopt
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.head_class import HeadClass
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.hooks.state.prompt_rows import prompt_rows
from vtoken.hooks.state.run import Clock
from vtoken.stages import Stage, uploaded
from vtoken.stages.cache import CacheStage, Decision, HeadClasses


class HeadSplitter(CacheShrinker):
    """A tap on every decoder layer with attention, and a pre-hook that sees the cache."""

    def __init__(self, context: Context, stage: CacheStage) -> None:
        super().__init__(context, stage)
        self.goes_on, self.thinning = True, context.at("attention")
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
            for other in self.thinning if splits else ():
                flow.skip(other, f"the cache holds {flow.past} tokens already, and heads in classes of them")
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
        """Leaves every class what it holds of the prompt; `before`: the classes of earlier turns, None: none yet."""
        number, rows = module.layer_idx, prompt_rows(flow)
        with Clock(k.device) as clock:
            fresh = _fresh(before, len(rows))
            decisions = [
                self._decide(flow, module, r, q, k, v, scale, None if fresh[r] else before) for r in range(len(rows))
            ]
            changed = before is not None or any(d and changes(d, rows[r].prompt) for r, d in enumerate(decisions))
            classes = split(flow, rows, decisions, k, v, before, fresh) if changed else ()
        stay = [row.prompt if d is None else _mean(d) for row, d in zip(rows, decisions, strict=True)]
        shown = tuple(replace(row, stay=n) for row, n in zip(rows, stay, strict=True))
        flow.shrunk[number] = ShrunkLayer(flow.group, shown, tuple(decisions), True, flow.live, clock)
        if not changed:
            return out
        cached = flow.cache.layers[number]
        cached = adopt(cached, classes, k.shape[2] if before is None else cached.total)
        return self._answer(flow, cached, q, k, v, scale, out) if any(flow.tails) else out

    def _decide(
        self,
        flow: PrefillState,
        module: Any,
        r: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scale: float,
        before: tuple[HeadClass, ...] | None,
    ) -> HeadClasses | None:
        """What the stage says of one row; None where it does not act."""
        row = prompt_rows(flow)[r]
        begin = k.shape[2] - row.prompt - row.tail
        here = slice(begin, begin + row.prompt)
        seen = self.shown(flow, module, slice(r, r + 1), k[r, :, here], v[r, :, here], q, scale)
        if seen is None:
            return None
        if before is not None:
            seen = replace(seen, classes=tuple(each.heads[r] for each in before))
        with torch.no_grad():
            return checked(self.stage, self.compress(seen), k.shape[1], row.prompt)

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


def changes(decision: HeadClasses, prompt: int) -> bool:
    """Whether anything of so many tokens leaves, or will leave."""
    held = [each.stay.shape[1] + each.latest.shape[1] for each in decision.classes]
    return any(n < prompt for n in held) or any(each.window is not None for each in decision.classes)


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
