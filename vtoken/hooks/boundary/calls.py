"""Calls of the language model that cannot be served once tokens are dropped, and the cache of one that can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import DynamicCache

from vtoken.errors import UnsupportedError
from vtoken.hooks.cache.clear import check_clearing
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.decode.choose import SlotChooser
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.prefill_state import PrefillState


def check_packed(kwargs: dict, config: Any) -> None:
    """Refuses several samples in one row. Asks the device only where positions come without mask and cache.

    Raises:
        UnsupportedError: positions that start again, or lengths of samples as flash attention takes them.
    """
    positions, use_cache = kwargs.get("position_ids"), kwargs.get("use_cache")
    packed = kwargs.get("cu_seq_lens_q") is not None
    if (
        positions is not None
        and kwargs.get("attention_mask") is None
        and kwargs.get(CACHE) is None
        and not (config.use_cache if use_cache is None else use_cache)
    ):
        # Of four axes, the one in front is the text's; three tell nothing of samples.
        text = positions if positions.ndim == 2 else positions[0] if len(positions) == 4 else positions[0, :, :0]
        packed = packed or bool((text.diff(dim=-1) != 1).any())
    if packed:
        raise UnsupportedError(
            "several samples in one row (position_ids that start again, or cu_seq_lens) cannot be kept apart once "
            "tokens are dropped: give each sample a row of its own, padded, with an attention_mask; or unwrap the model"
        )


def check_labels(flow: PrefillState) -> None:
    """Refuses labels on what a dropped token would predict: it has no logits.

    Raises:
        ValueError: a label that is not -100 follows a dropped token.
    """
    if flow.labels is None or flow.labels.shape != flow.alive.shape:
        return
    supervised = flow.labels.to(flow.alive.device)[:, 1:] != -100
    if bool((supervised & flow.new[:, :-1] & ~flow.alive[:, :-1]).any()):
        raise ValueError(
            "labels supervise the token after a dropped visual token, which has no logits; "
            "set labels to -100 on image tokens and on the token that follows an image"
        )


def checked_cache(
    context: Context, flow: PrefillState, use_cache: bool | None, users: Sequence[CacheShrinker | SlotChooser | None]
) -> Any:
    """The cache that takes the pruned prompt: a new one where the model would make one; None where none is used.

    Args:
        users: those that change or read it for stages; each checks it.

    Raises:
        UnsupportedError: it cannot serve a stage, or is static with layers that all slide.
    """
    cache, config = flow.cache, context.lm.config
    if cache is None and (config.use_cache if use_cache is None else use_cache):
        flow.cache = cache = DynamicCache(config=config)
    if flow.skip_reason is None:
        for user in users:
            if user is not None:
                user.check(cache)
        for stage in context.at("decoder"):
            if stage.clears_earlier_layers():
                check_clearing(stage, flow, context.attending)
    if cache is not None and cache.is_compileable and all(cache.is_sliding):
        raise UnsupportedError(
            "a static cache whose layers all slide does not tell how many tokens it is made for; use a dynamic "
            "cache (cache_implementation=None)"
        )
    return cache
