"""Turns the arguments of a forward of the language model into the state that hooks work on."""

from __future__ import annotations

import torch
from torch import Tensor

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.cache_argument import CACHE
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import ForwardState
from vtoken.hooks.state.pruned_cache import PrunedCache, lengthened


def forward_of(context: Context, kwargs: dict) -> ForwardState:
    """The state of this forward before anything is decided; UnsupportedError at a 4D mask without a static cache."""
    x, mask, cache = kwargs["inputs_embeds"], kwargs.get("attention_mask"), kwargs.get(CACHE)
    batch, length = x.shape[:2]
    if isinstance(mask, dict):
        mask = mask["full_attention"]
    past = int(cache.get_seq_length()) if cache is not None else 0
    if mask is not None and mask.ndim == 4:
        if cache is None or not cache.is_compileable:
            raise UnsupportedError(
                "a custom 4D attention mask cannot be kept consistent when tokens are dropped; pass a 2D padding mask"
            )
        # generate() built it for a static cache from logical lengths; only its padding matters here.
        given = context.run.padding
        if given is not None and given.shape == (batch, past + length):
            mask = given
        else:
            known = cache.prompt_mask if isinstance(cache, PrunedCache) and past else as_bool(mask)[:, 0, -1]
            mask = None if known is None else lengthened(known[:, : past + length], past + length)
    if mask is None:
        new = torch.ones(batch, length, dtype=torch.bool, device=x.device)
    else:
        new = mask[:, -length:].to(x.device).bool()
    positions = kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + length, device=x.device)[None]
        index = positions.expand(batch, -1) if not past else torch.arange(length, device=x.device).expand(batch, -1)
    else:
        index = torch.arange(length, device=x.device).expand(batch, -1)
    return ForwardState(
        new,
        [length] * batch,
        past,
        mask,
        positions,
        cache,
        x,
        new,
        index,
        new,
        renumbers=context.compact,
        owner=context.owner,
    )


def lagging(kwargs: dict, shift: Tensor) -> Tensor:
    """Position ids that lag behind the logical ones by `shift` [B, 1] (compact positions, resized pictures)."""
    x, positions = kwargs["inputs_embeds"], kwargs.get("position_ids")
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)[None] + kwargs[CACHE].get_seq_length()
    return positions - shift


def as_bool(mask: Tensor) -> Tensor:
    """True where a 4D mask lets attention through, whatever its dtype."""
    return mask == 0 if mask.is_floating_point() else mask.bool()
