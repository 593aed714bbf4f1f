"""What every class of key heads holds of a prompt, row by row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vtoken.hooks.cache.cached_rows import PromptRow, joined, prompt_in
from vtoken.hooks.state.head_class import HeadClass, Lost
from vtoken.hooks.state.left_padding import left_padded
from vtoken.hooks.state.prefill_state import PrefillState
from vtoken.stages import uploaded
from vtoken.stages.cache import HeadClasses, HeadSlots

Piece = tuple[Tensor, Tensor]  # keys and values [Hc, n, d] of a row
Decisions = Sequence[HeadClasses | None]


def split(
    flow: PrefillState,
    rows: Sequence[PromptRow],
    decisions: Decisions,
    k: Tensor,
    v: Tensor,
    before: tuple[HeadClass, ...] | None,
    fresh: Sequence[bool],
) -> tuple[HeadClass, ...]:
    """The classes of a layer once the prompt is read.

    Args:
        k, v: [B, Hk, S, d]; the new tokens are the last. Where no head is in a class yet, the tokens of
            earlier turns stand in front of them, and stay for good.
        before: the classes of earlier turns; None: none yet.
        fresh: which rows were given no pictures before.
    """
    width = flow.index.shape[1]
    past = k.shape[2] - width
    if before is None:
        first = next(d for d in decisions if d is not None)
        real = None if flow.key_mask is None else flow.key_mask[:, :past].bool().to(k.device)
        before = tuple(
            _start(each, decisions, c, k[:, :, :past], v[:, :, :past], real) for c, each in enumerate(first.classes)
        )
    new = k[:, :, past:], v[:, :, past:]
    return tuple(_extended(old, c, rows, decisions, *new, fresh) for c, old in enumerate(before))


def _start(
    like: HeadSlots, decisions: Decisions, c: int, keys: Tensor, values: Tensor, real: Tensor | None
) -> HeadClass:
    """Class number `c` before the first prompt with pictures: it holds all that earlier turns cached."""
    heads = torch.stack([like.heads if d is None else d.classes[c].heads for d in decisions]).to(keys.device)
    keys, values = (t.take_along_dim(heads[..., None, None], 1) for t in (keys, values))
    past = keys.shape[2]
    lost = Lost.nothing(keys, values) if like.compensated else None
    return HeadClass(heads, keys, values, past, like.window, real if past else None, None, lost)


def _extended(
    old: HeadClass,
    c: int,
    rows: Sequence[PromptRow],
    decisions: Decisions,
    k: Tensor,
    v: Tensor,
    fresh: Sequence[bool],
) -> HeadClass:
    """Class number `c` after a prompt: what it had, and those of the new tokens k, v [B, Hk, n, d] that it keeps.
    The new tokens end with each row's prompt and its tail."""
    keys, values = old.own(k), old.own(v)
    fixed, latest = list[Piece](), list[Piece]()
    for r, (row, decision) in enumerate(zip(rows, decisions, strict=True)):
        x, y = (t[r, :, prompt_in(row, k.shape[2])] for t in (keys, values))
        stays, leaves = _parts(old, r)
        if decision is None:
            leaves = _behind(leaves, (x, y))
        else:
            mine = decision.classes[c]
            if fresh[r]:  # what was there before any picture stays
                stays, leaves = _behind(stays, leaves), (x[:, :0], y[:, :0])
            stays = _behind(stays, _chosen(x, y, mine.stay))
            leaves = _behind(leaves, _chosen(x, y, mine.latest))
        fixed.append(stays)
        latest.append(leaves)
    lost = old.lost and old.lost.more(keys, values, _gone(rows, decisions, c, k.shape[2], k.device))
    exempt = [new and d is None for new, d in zip(fresh, decisions, strict=True)]
    first, then = _padded(fixed), _padded(latest)
    alike = all(len({x.shape[1] for x, _ in part}) == 1 for part in (fixed, latest))
    left = HeadClass(
        old.heads,
        torch.cat([first[0], then[0]], 2),
        torch.cat([first[1], then[1]], 2),
        first[0].shape[2],
        old.window,
        None if alike else torch.cat([first[2], then[2]], 1),
        uploaded(exempt, k.device, torch.bool) if any(exempt) else None,
        lost,
    )
    return left if left.window is None else left.trimmed(left.window)


def _gone(rows: Sequence[PromptRow], decisions: Decisions, c: int, width: int, device: torch.device) -> Tensor:
    """[B, width] which new tokens of the prompt no head of class number `c` holds."""
    gone = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for out, row, decision in zip(gone, rows, decisions, strict=True):
        if decision is not None:
            prompt = out[prompt_in(row, width)]
            prompt.fill_(True)
            for index in (decision.classes[c].stay, decision.classes[c].latest):
                prompt.index_fill_(0, index[0], False)
    return gone


def _parts(head_class: HeadClass, row: int) -> list[Piece]:
    """What a row of a class holds for good, and what it holds until its window slides on, without padding."""
    out: list[Piece] = []
    for part in (slice(0, head_class.fixed), slice(head_class.fixed, head_class.length)):
        keys, values = head_class.keys[row, :, part], head_class.values[row, :, part]
        if head_class.real is not None:
            real = head_class.real[row, part]
            keys, values = keys[:, real], values[:, real]
        out.append((keys, values))
    return out


def _chosen(keys: Tensor, values: Tensor, index: Tensor) -> Piece:
    """Keys and values [Hc, n, d] at these slots [Hc or 1, n]."""
    at = index[..., None].expand(len(keys), -1, -1)
    return keys.gather(1, at.expand(-1, -1, keys.shape[2])), values.gather(1, at.expand(-1, -1, values.shape[2]))


def _behind(first: Piece, then: Piece) -> Piece:
    return joined([first[0], then[0]], 1), joined([first[1], then[1]], 1)


def _padded(rows: Sequence[Piece]) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [B, Hc, n, d] of all rows, padded on the left, and [B, n] which of them are no padding."""
    keys, values = (left_padded([row[side] for row in rows]) for side in (0, 1))
    lengths = uploaded([row[0].shape[1] for row in rows], keys.device)
    return keys, values, torch.arange(keys.shape[2], device=keys.device) >= keys.shape[2] - lengths[:, None]
