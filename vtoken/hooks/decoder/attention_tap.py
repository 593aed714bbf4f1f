"""A tap on the decoder's attention, layer by layer, that leaves the model's own backend in charge.

While a forward needs it, each tapped module has a shadow config that differs only in the name of its attention
implementation. Masks are made from the real config, so they keep the backend's format, and nothing global changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtoken.hooks.decoder.attention_facts import FUNCTIONS, text_rows
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.hooks.state.prefill_state import Observed, PrefillState
from vtoken.hooks.state.run import Run
from vtoken.stages import Fact, Stage
from vtoken.stages.facts import read_of

NAME = "vtoken"
HANDED = "vtoken_handed"  # argument of a decoder layer that goes through to the tap of its attention, and no further
OBSERVED = read_of("decoder layer")
# fn(module, q, k, v, mask, original, **kwargs) -> (output, weights); q and k carry RoPE, k and v include the cache.
Tap = Callable[..., tuple[Tensor, Tensor | None]]


def tap(handle: Handle, lm: Any, layers: Iterable[int], function: Tap) -> None:
    """Sends the attention of these decoder layers through `function`, which may call `original()`; an earlier tap is
    its original."""
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
    """A module as attention functions see it, with another config; the module itself is not written to (threads share
    it)."""

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
                asked.setdefault(layer, []).append((stage, OBSERVED[need.name].part_of or need.name))
    return asked


def observe(context: Context) -> None:
    """Keeps what stages ask to be told of decoder layers, slot by slot (see attention_facts.py).

    With an answer or drafts behind the prompt (`prompt_text.answered`) the last prompt token stands before them, so the
    decision is the one that `generate` makes.
    """
    asked, run, config = tapped(context.at("decoder"), context.depth), context.run, context.lm.config

    def function(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, original: Callable[..., Any], **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling") or k.shape[-1] ** -0.5
        _keep(run, module.layer_idx, asked[module.layer_idx], q, k, v, scale, window_of(config, module.layer_idx))
        return original()

    if asked:
        tap(context.handle, context.lm, asked, function)


@eager
@torch.no_grad()
def _keep(
    run: Run,
    layer: int,
    asked: Sequence[tuple[Stage, str]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    window: int | None,
) -> None:
    """Stores the facts of a layer from its q, k and v [B, H, ., d]; without gradients, because a layer that
    checkpointing runs again does not store them again."""
    flow = run.flow
    if not isinstance(flow, PrefillState) or flow.skip_reason is not None:
        return
    # A static cache hands out all its slots, and only those filled so far count; a layer with a window may hand out the
    # last ones alone.
    k, v = (t[:, :, : flow.slots].detach() for t in (k, v))
    flow.window = window
    key_mask = (
        torch.ones(len(k), flow.slots, dtype=torch.bool, device=k.device)
        if flow.key_mask is None
        else flow.key_mask.bool()
    )
    key_mask = key_mask[:, -k.shape[2] :].to(k.device)
    for stage, name in asked:
        fact = Fact(name, layer)
        if OBSERVED[name].queries == "chosen":
            asked_text = flow.asked[id(stage)]
            asked_text.found[layer] = Observed(text_rows(flow, asked_text.tokens, q, k, key_mask, scale), flow.index)
        elif fact not in flow.facts:
            values = FUNCTIONS[name](flow, q.detach(), k, v, key_mask, scale)
            flow.facts[fact] = Observed(values, flow.index)
