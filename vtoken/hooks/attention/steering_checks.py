"""Which decoders, calls and other stages go with stages that steer attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vtoken.errors import OtherModelError, UnsupportedError
from vtoken.hooks.decoder.attention_tap import AttentionCall
from vtoken.hooks.state.layer_kinds import heads_in
from vtoken.stages import Stage
from vtoken.stages.steering import CHANNELS, SteeredAttention

BEFORE = ("pixels", "frames", "encoder", "tokens", "decoder")  # sites whose stages leave tokens in known slots
WIDEST = 256  # head width that flash attention takes


def check_call(stage: SteeredAttention, call: AttentionCall) -> None:
    """Refuses calls for which attention cannot be steered.

    Raises:
        UnsupportedError: says why.
    """
    if call.kwargs.get("output_attentions"):
        raise UnsupportedError(
            f"stage {stage.name} changes what attention gives and keeps no weights; leave output_attentions out"
        )
    if found := call.unusual():
        raise UnsupportedError(f"stage {stage.name}: this layer's attention is not plain causal attention ({found})")


def acting(stage: SteeredAttention, depth: int, attending: Sequence[int]) -> list[int]:
    """Layers in which the stage steers or marks, of those that attend."""
    layers = {k for k in stage.layers(depth) if k in attending}
    return sorted(layers | {m for m in map(stage.marked_by, layers) if m is not None})


def thins(stage: Stage) -> bool:
    """Whether a stage of site attention decides what a prompt reads."""
    return stage.site == "attention" and not stage.unmerge_mode() and not isinstance(stage, SteeredAttention)


def check_steering(stages: Sequence[Stage], lm: Any, attending: Sequence[int]) -> None:
    """Refuses steering stages that no layer can serve, and stages that cannot be combined with them.

    Raises:
        UnsupportedError, OtherModelError: names the stages.
    """
    for stage in stages:
        if not isinstance(stage, SteeredAttention):
            continue
        others = [s for s in stages if s is not stage and s.site not in BEFORE]
        if others:
            raise UnsupportedError(
                f"stage {stage.name} changes what attention gives, and {others[0].name} (site {others[0].site}) what "
                f"it reads; leave one of the two out. Stages of sites {', '.join(BEFORE)} go with {stage.name}"
            )
        check_heads(stage, lm.config)
        check_layers(stage, len(lm.layers), attending)


def check_layers(stage: SteeredAttention, depth: int, attending: Sequence[int]) -> None:
    """Refuses layers that do not exist or keep a state."""
    layers = stage.layers(depth)
    if not [k for k in layers if k in attending] or max(layers) >= depth:
        where = f"decoder layers {list(layers)}" if layers else "no decoder layer"
        raise UnsupportedError(
            f"stage {stage.name} acts in {where}; this model has layers 0 to {depth - 1}, and "
            f"attention in {list(attending)}"
        )
    if lacking := set(acting(stage, depth, attending)) - set(attending):
        raise UnsupportedError(
            f"stage {stage.name} reads attention in decoder layers {sorted(lacking)}, which keep a state instead; "
            f"layers {list(attending)} attend"
        )


def check_heads(stage: SteeredAttention, config: Any) -> None:
    """Refuses heads that do not exist, or to which no channel can be added."""
    heads, _, width = heads_in(config)
    if why := stage.unknown_heads(config.num_hidden_layers, heads):
        raise OtherModelError(f"stage {stage.name}: {why}")
    if "flash" in (config._attn_implementation or "") and width + CHANNELS > WIDEST:
        raise UnsupportedError(
            f"stage {stage.name} adds {CHANNELS} channels to attention heads of width {width}, and flash attention "
            f'takes {WIDEST} at most; load the model with attn_implementation="sdpa"'
        )
