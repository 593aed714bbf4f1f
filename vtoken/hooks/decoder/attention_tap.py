"""A tap on the decoder's attention, layer by layer, that leaves the model's own backend in charge.

While a forward needs it, each tapped module has a shadow config that differs only in the name of its attention implementation. Masks are
made from the real config, so they keep the backend's format, and nothing global changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtoken.hooks.decoder.attention_facts import ROWS, causal
from vtoken.hooks.state.forward_state import Observed, PrefillState, eager
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.prompt_text import text_slots
from vtoken.hooks.state.run import Run
from vtoken.kernels import query_attention
from vtoken.stages import Fact, Stage, offsets_of, uploaded

NAME = "vtoken"
HANDED = "vtoken_handed"  # argument of a decoder layer that goes through to the tap of its attention, and no further
# Fact of a stage -> what is kept of the layer for it.
OBSERVED = {
    "last_query_attention": "last_query_attention",
    "text_attention": "text_attention",
    "keys": "keys",
    "later_keys": "keys",
    **{name: name for name in ROWS},
}
# fn(module, q, k, v, mask, original, **kwargs) -> (output, weights); q and k carry RoPE, k and v include the cache.
Tap = Callable[..., tuple[Tensor, Tensor | None]]


def tap(handle: Handle, lm: Any, layers: Iterable[int], function: Tap) -> None:
    """Sends the attention of these decoder layers through `function`, which may call `original()`; an earlier tap is its original."""
    AttentionInterface.register(NAME, _dispatch)
    for layer in layers:
        module = lm.layers[layer].self_attn
        if "vtoken_tap" in vars(module):
            earlier, config = module.vtoken_tap
            handle.set(module, "vtoken_tap", (_chain(function, earlier), config))
            continue
        shadow = copy.copy(module.config)
        shadow._attn_implementation_internal = NAME
        handle.set(module, "vtoken_tap", (function, module.config))
        handle.switch.add(module, "config", shadow)


def _chain(outer: Tap, inner: Tap) -> Tap:
    """A tap whose `original` is another tap."""

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        def within(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Any = mask) -> Any:
            def innermost(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Any = mask) -> Any:
                return original(q, k, v, mask)

            return inner(module, q, k, v, mask, innermost, **kwargs)

        return outer(module, q, k, v, mask, within, **kwargs)

    return function


def _dispatch(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    # Whoever wraps attention functions (kvpress does, all of them) may hand dropout on by its place.
    kwargs["dropout"] = dropout
    function, config = module.vtoken_tap
    name = config._attn_implementation
    handed = {HANDED: kwargs.pop(HANDED)} if HANDED in kwargs else {}

    def original(q: Tensor = q, k: Tensor = k, v: Tensor = v, mask: Any = mask) -> Any:
        attend = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        if "flash" not in name:
            return attend(module, q, k, v, mask, **kwargs)
        # The flash wrapper reads the implementation from module.config, so it sees a stand-in with the real one.
        return attend(_WithConfig(module, config), q, k, v, mask, **kwargs)

    return function(module, q, k, v, mask, original, **kwargs, **handed)


class _WithConfig:
    """A module as attention functions see it, with another config; the module itself is not written to (threads share it)."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def tapped(stages: Sequence[Stage], depth: int) -> dict[int, list[tuple[Stage, str]]]:
    """Decoder layer -> which stage asks for which of its facts."""
    asked: dict[int, list[tuple[Stage, str]]] = {}
    for stage in stages:
        for need in stage.needs():
            for k in stage.layers(depth) if need.name in OBSERVED else ():
                layer = k - 1 if need.layer is None else need.layer % depth
                asked.setdefault(layer, []).append((stage, OBSERVED[need.name]))
    return asked


def observe(run: Run, asked: Mapping[int, Sequence[tuple[Stage, str]]]) -> Tap:
    """Keeps what stages ask for of the layers in `asked`, slot by slot: attention of the last prompt token `last_query_attention` or
    of chosen text tokens `text_attention`, head mean, [B, slots], `keys` [B, slots, H, d], and what ROWS has.

    With an answer or drafts behind the prompt (`prompt.answered`) the last prompt token stands before them, so the decision is the one
    that `generate` makes.
    """

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling") or k.shape[-1] ** -0.5
        _keep(run, module.layer_idx, asked[module.layer_idx], q, k, v, scale)
        return original()

    return function


@eager
@torch.no_grad()
def _keep(
    run: Run, layer: int, asked: Sequence[tuple[Stage, str]], q: Tensor, k: Tensor, v: Tensor, scale: float
) -> None:
    """Stores the facts of a layer from its q, k and v [B, H, ., d]; without gradients, because a layer that checkpointing runs again does
    not store them again."""
    flow = run.flow
    if not isinstance(flow, PrefillState) or flow.skip_reason is not None:
        return
    # A static cache hands out all its slots; only those filled so far count.
    k, v = (t[:, :, : flow.slots].detach() for t in (k, v))
    whole = flow.key_mask is None and flow.answer is None
    key_mask = (
        torch.ones(len(k), flow.slots, dtype=torch.bool, device=k.device)
        if flow.key_mask is None
        else flow.key_mask.bool()
    )
    key_mask = key_mask.to(k.device)
    for stage, name in asked:
        fact = Fact(name, layer)
        if name == "text_attention":
            values = _text_rows(flow, flow.memory[id(stage)]["raters"], q, k, key_mask, scale)
            flow.memory[id(stage)][f"{name} {layer}"] = Observed(values, flow.index)
        elif fact not in flow.facts:
            if name in ROWS:
                values = ROWS[name](flow, q.detach(), k, v, key_mask, scale)
            elif name == "last_query_attention":
                values = last_row(flow.of_last(q, 2), k, None if whole else key_mask, flow.tails, scale)
            else:
                values = k.transpose(1, 2)
            flow.facts[fact] = Observed(values, flow.index)


def last_row(q: Tensor, k: Tensor, key_mask: Tensor | None, tails: Sequence[int], scale: float) -> Tensor:
    """[B, slots] attention of one query per row, head mean.

    Args:
        q: [B, H, d] of the last prompt token; k: [B, H, slots, d].
        key_mask: [B, slots] slots that hold something; None: all do, and none comes after the query.
        tails: per row, how many slots at the end come after the query.
    """
    if key_mask is None:
        batch, slots = len(k), k.shape[2]
        each, all_of = (offsets_of([n] * batch, k.device) for n in (1, slots))
        return query_attention(q, k.transpose(1, 2).flatten(0, 1), each, all_of, scale).view(batch, slots)
    if any(tails):
        ends = key_mask.shape[1] - uploaded(tails, key_mask.device)
        key_mask = key_mask & (torch.arange(key_mask.shape[1], device=key_mask.device) < ends[:, None])
    one_each = torch.arange(len(k) + 1, dtype=torch.int32, device=k.device)
    packed = query_attention(
        q, k.transpose(1, 2)[key_mask], one_each, offsets_of(key_mask.sum(1).tolist(), k.device), scale
    )
    return packed.new_zeros(key_mask.shape).masked_scatter(key_mask, packed)


def _text_rows(
    flow: PrefillState, raters: Sequence[Tensor], q: Tensor, k: Tensor, key_mask: Tensor, scale: float
) -> Tensor:
    """[B, slots] attention that the slots of each image receive from its raters, mean over them and the heads; 0 elsewhere.

    Args:
        raters: per image, which text tokens of its row.
    """
    v, past = flow.live, flow.slots - flow.index.shape[1]
    out, text = q.new_zeros(key_mask.shape, dtype=torch.float32), text_slots(flow).to(q.device)
    lines, columns = (i.to(q.device).split(v.lengths) for i in flow.slot())
    for row, batch_row, column, chosen in zip(v.row, lines, columns, raters, strict=True):
        if len(chosen):
            at = text[row].nonzero()[:, 0][chosen.to(q.device)]
            mean = _causal_mean(q[row, :, at], k[row], key_mask[row], at + past, scale)
            out[batch_row, column + past] = mean[column + past]
    return out


def _causal_mean(q: Tensor, k: Tensor, key_mask: Tensor, at: Tensor, scale: float) -> Tensor:
    """[N] attention of the queries [H, R, d] that stand in the slots `at` [R] of the keys [Hk, N, d], mean over queries and heads."""
    total = torch.stack([part.sum((0, 1, 2)) for part in causal(q, k, key_mask, at, scale)]).sum(0)
    return total / (q.shape[0] * q.shape[1])
