"""What tokens see whose key heads are in two classes, token by token, in plain loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def visible(turns: Sequence[tuple[Sequence[bool], bool]], sink: int, recent: int, text: bool = True) -> Tensor:
    """[N, N] what each token sees where a head streams.

    Args:
        turns: which tokens of each are visual, and whether it is a prompt with pictures.
    """
    n = sum(len(visual) for visual, _ in turns)
    seen = torch.zeros(n, n, dtype=torch.bool)
    stay: list[int] = []
    latest: list[int] = []
    begin, first = 0, True
    for visual, pictures in turns:
        mine = range(begin, begin + len(visual))
        if not pictures:
            for t in mine:
                latest = [*latest, t][-recent:]
                seen[t, [*stay, *latest]] = True
        else:
            for t in mine:
                seen[t, [*stay, *latest, *range(begin, t + 1)]] = True
            others = [t for t in mine if visual[t - begin]] if text else list(mine)
            sinks = others[: sink if first else 0]
            stay += [t for t in mine if t not in others or t in sinks]
            latest = [*latest, *(t for t in others if t not in sinks)][-recent:]
            first = False
        begin += len(visual)
    return seen


def by_layer(model: Any, stage: Any, seen: Tensor) -> dict[int, Tensor]:
    """[H, N, N] what queries see in every layer: `seen` in heads that stream, everything in the others."""
    config = model.get_decoder().config
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    out = {}
    for k in range(config.num_hidden_layers):
        streams = stage.streams(k) or (True,) * key_heads
        each = [seen if s else torch.ones_like(seen) for s in streams]
        out[k] = torch.stack(each).repeat_interleave(heads // key_heads, 0)
    return out


def gates(model: Any) -> tuple[tuple[float, ...], ...]:
    """Gates of which half stream, in some layers none and in some all."""
    config = model.get_decoder().config
    heads = config.num_key_value_heads
    mixed = tuple(0.0 if h % 2 else 1.0 for h in range(heads))
    kinds = (mixed, (0.0,) * heads, mixed, (1.0,) * heads)
    return tuple(kinds[k % 4] for k in range(config.num_hidden_layers))
