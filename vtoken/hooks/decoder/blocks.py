"""How much the attention and the MLP of decoder layers change each token: what they are given, and return."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.prefill_state import Observed, PrefillState
from vtoken.hooks.state.run import Run
from vtoken.stages import Fact, spec_of

NAME = "transition"


def watch_blocks(context: Context) -> None:
    """Keeps the changes of the layers that stages ask about, from the layer they name to the one before the cut.

    Raises:
        UnsupportedError: a layer that is not attention and an MLP.
    """
    watched: set[int] = set()
    for stage in context.at("decoder"):
        for need in stage.needs():
            spec = spec_of(need.name, "decoder")
            if spec is not None and spec.read == "blocks":
                for k in stage.for_depth(context.depth).layers(context.depth):
                    watched.update(range(k - 1 if need.layer is None else need.layer % context.depth, k))
    for k in sorted(watched):
        for block in blocks_of(context.lm.layers[k]):
            context.handle.after(block, partial(_after, context.run, k))


def blocks_of(layer: nn.Module) -> tuple[nn.Module, nn.Module]:
    """A layer's attention and its MLP.

    Raises:
        UnsupportedError: there are none of these names.
    """
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise UnsupportedError(
            f"{NAME} cannot be read of {type(layer).__name__}: it has no self_attn and mlp; use a stage that reads "
            "last_query_attention"
        )
    return attention, mlp


def _after(run: Run, k: int, module: nn.Module, args: tuple, kwargs: dict, out: Any) -> None:
    given = args[0] if args else kwargs["hidden_states"]
    if given.shape[1] > 1:  # nothing is read of a decode step, which may be compiled
        _note(run, k, given, out[0] if isinstance(out, tuple) else out)


@eager
@torch.no_grad()
def _note(run: Run, k: int, given: Tensor, out: Tensor) -> None:
    flow, fact = run.flow, Fact(NAME, k)
    if not isinstance(flow, PrefillState) or flow.skip_reason is not None:
        return
    prompt = flow.valid.bool() if flow.answer is None else flow.valid.bool() & ~flow.answer.gather(1, flow.index)
    values = change(given, out, prompt.to(given.device))
    before = flow.facts.get(fact)
    flow.facts[fact] = Observed(values if before is None else before.values + values, flow.index)


def change(given: Tensor, out: Tensor, real: Tensor) -> Tensor:
    """[B, P] float32 of what a block was given and returned [B, P, D]: |out| / |given|, times the token's share of
    exp(1 - cosine) among the `real` [B, P] of its row; 0 at others."""
    given, out = given.float(), out.float()
    weight = (1 - F.cosine_similarity(given, out, dim=-1)).exp().masked_fill(~real, 0)
    ratio = out.norm(dim=-1) / given.norm(dim=-1).clamp(min=1e-12)
    return (ratio * weight / weight.sum(1, keepdim=True).clamp(min=1e-12)).masked_fill(~real, 0)


def changed_since(flow: PrefillState, since: int, k: int) -> Tensor:
    """[B, P] sum of the changes in layers `since` to k - 1, of the tokens of the current layout."""
    each = [flow.facts[Fact(NAME, layer)].now(flow.index, flow.new.shape[1]) for layer in range(since, k)]
    return torch.stack(each).sum(0)
