"""A tap on the decoder's attention, layer by layer, that leaves the model's own backend in charge.

While a forward needs it, each tapped module has a shadow config that differs only in the name of its attention
implementation. Masks are made from the real config, so they keep the backend's format, and nothing global changes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vtoken.hooks.decoder.attention_facts import FUNCTIONS, LayerAttention, attention_of_text
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.layer_kinds import window_of
from vtoken.hooks.state.prefill_state import Observed, PrefillState
from vtoken.stages import Fact, Stage
from vtoken.stages.facts import read_of

NAME = "vtoken"
HANDED = "vtoken_handed"  # argument of a decoder layer that goes through to the tap of its attention, and no further
OBSERVED = read_of("decoder layer")
# Arguments of attention functions that change what attention means.
UNUSUAL = ("softcap", "s_aux", "position_bias", "sliding_window")


@dataclass(frozen=True)
class AttentionCall:
    """A call of the attention function of a decoder layer.

    Attributes:
        module: the layer's attention.
        q: [B, H, n, d] queries; k, v: [B, Hk, S, d] keys and values with the cache. Queries and keys carry RoPE.
        mask: in the backend's format.
        attend: attend(q, k, v, mask) -> (output [B, n, H, d], weights), the backend's attention or an earlier tap.
        kwargs: the other arguments of the function.
        handed: what the layer was called with under HANDED.
    """

    module: Any
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    attend: Callable[[Tensor, Tensor, Tensor, Any], Any]
    kwargs: dict[str, Any]
    handed: Any = None

    @property
    def layer(self) -> int:
        return int(self.module.layer_idx)

    @property
    def scale(self) -> float:
        """Factor on q . k."""
        return self.kwargs.get("scaling") or self.q.shape[-1] ** -0.5

    def original(self) -> Any:
        """Output and weights as they are without this tap."""
        return self.attend(self.q, self.k, self.v, self.mask)

    def unusual(self) -> str:
        """What makes this another than plain causal attention; "" if nothing does."""
        found = [name for name in UNUSUAL if self.kwargs.get(name) is not None]
        return ", ".join(found) or ("" if getattr(self.module, "is_causal", True) else "is_causal is False")

    def skip_reason(self) -> str | None:
        """Why nothing may take the place of this call; None if something may."""
        if self.module.training or self.kwargs.get("dropout"):
            return "the model is in training mode"
        if self.kwargs.get("output_attentions"):
            return "attention weights were asked for"
        if found := self.unusual():
            return f"this layer's attention is not plain causal attention ({found})"
        return None


Tap = Callable[[AttentionCall], Any]  # returns output and weights, as `original` does


def tap(handle: Handle, lm: Any, layers: Iterable[int], function: Tap) -> None:
    """Sends the attention of these decoder layers through `function`; an earlier tap is its original."""
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

    def function(call: AttentionCall) -> Any:
        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
            return inner(replace(call, q=q, k=k, v=v, mask=mask))

        return outer(replace(call, attend=attend))

    return function


@eager
def _dispatch(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, dropout: float = 0.0, **kwargs: Any) -> Any:
    # Whoever wraps attention functions (kvpress does, all of them) may hand dropout on by its place.
    kwargs["dropout"] = dropout
    function, config = module.vtoken_tap
    name, handed = config._attn_implementation, kwargs.pop(HANDED, None)

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Any) -> Any:
        backend = ALL_ATTENTION_FUNCTIONS.get(name) or sys.modules[type(module).__module__].eager_attention_forward
        # The flash wrapper reads the implementation from module.config, so it sees a stand-in with the real one.
        caller = _WithConfig(module, config) if "flash" in name else module
        return backend(caller, q, k, v, mask, **kwargs)

    return function(AttentionCall(module, q, k, v, mask, attend, kwargs, handed))


class _WithConfig:
    """A module as attention functions see it, with another config; the module itself is not written to (threads share
    it)."""

    def __init__(self, module: Any, config: Any) -> None:
        self._module, self.config = module, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def observe(context: Context) -> None:
    """Keeps what stages ask of decoder layers, slot by slot (see attention_facts.py).

    With an answer or drafts behind the prompt (`prompt_text.answered`) the last prompt token stands before them, so the
    decision is the one that `generate` makes.
    """
    depth, run, config = context.depth, context.run, context.lm.config
    asked: dict[int, list[tuple[Stage, str]]] = {}  # layer -> stages, and the facts that they ask of it
    for stage in context.at("decoder"):
        for need in stage.needs():
            for k in stage.layers(depth) if need.name in OBSERVED else ():
                layer = k - 1 if need.layer is None else need.layer % depth
                asked.setdefault(layer, []).append((stage, OBSERVED[need.name].part_of or need.name))

    def function(call: AttentionCall) -> Any:
        flow = run.flow
        if isinstance(flow, PrefillState) and flow.skip_reason is None:
            _keep(flow, asked[call.layer], call, window_of(config, call.layer))
        return call.original()

    tap(context.handle, context.lm, asked, function)


@torch.no_grad()
def _keep(flow: PrefillState, asked: Sequence[tuple[Stage, str]], call: AttentionCall, window: int | None) -> None:
    """Stores the facts of a layer; without gradients, because a layer that checkpointing runs again does not store them
    again."""
    # A static cache hands out all its slots, and only those filled so far count; a layer with a window may hand out the
    # last ones alone.
    q, (k, v) = call.q.detach(), (t[:, :, : flow.slots].detach() for t in (call.k, call.v))
    if flow.key_mask is None:
        key_mask = torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device)
    else:
        key_mask = flow.key_mask.bool()[:, -k.shape[2] :].to(k.device)
    layer = LayerAttention(flow, q, k, v, key_mask, call.scale, window)
    for stage, name in asked:
        fact = Fact(name, call.layer)
        if OBSERVED[name].queries == "chosen":
            text = flow.asked[id(stage)]
            text.found[call.layer] = Observed(attention_of_text(layer, text.tokens), flow.index)
        elif fact not in flow.facts:
            flow.facts[fact] = Observed(FUNCTIONS[name](layer), flow.index)
