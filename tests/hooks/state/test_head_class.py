"""Classes of heads against lists of tokens: what is appended, leaves, is taken back, and is accounted for."""

from __future__ import annotations

import random

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from vtoken.hooks.cache.class_attention import read
from vtoken.hooks.state.classed_layer import adopt
from vtoken.hooks.state.head_class import HeadClass, Lost

HEADS, D, SCALE = 3, 4, 0.4


class Plain:
    """A row of one key head: its tokens in lists."""

    def __init__(self, fixed, window):
        self.fixed, self.latest, self.window, self.gone = list(fixed), [], window, []

    def add(self, token):
        self.latest.append(token)
        while self.window is not None and len(self.latest) > self.window:
            self.gone.append(self.latest.pop(0))

    def attend(self, q, compensated):
        """[d] in float64 for one query."""
        held = [*self.fixed, *self.latest]
        logits = [float(q @ k) * SCALE for k, _ in held]
        values = [v for _, v in held]
        if compensated and self.gone:
            keys, gone = (torch.stack(side).mean(0) for side in zip(*self.gone, strict=True))
            logits.append(float(q @ keys) * SCALE + float(torch.tensor(float(len(self.gone))).log()))
            values.append(gone)
        return torch.tensor(logits, dtype=torch.float64).softmax(0) @ torch.stack(values)


def layer(fixed, heads, windows, compensated, exempt):
    """A layer of B rows whose classes have these heads [B, Hc], with `fixed` [B, Hk, n, d] keys and values."""
    classes = []
    for own, window in zip(heads, windows, strict=True):
        one = HeadClass(own, *(t[:, : own.shape[1]] for t in fixed), fixed[0].shape[2], window, exempt=exempt)
        keys, values = (one.own(t) for t in fixed)
        lost = Lost.nothing(keys, values) if compensated and window else None
        classes.append(HeadClass(own, keys, values, one.fixed, window, exempt=exempt, lost=lost))
    cached = DynamicLayer()
    cached.update(*fixed)
    return adopt(cached, tuple(classes), fixed[0].shape[2])


@pytest.mark.parametrize("compensated", [False, True])
@pytest.mark.parametrize("seed", range(8))
def test_what_is_read_at_every_step(seed, compensated):
    """Chunks of different lengths, rows padded on the left, some without a window, others' heads in another order, and
    tokens that are taken back."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    rows, fixed, window = rng.choice([1, 2, 3]), rng.choice([0, 1, 3]), rng.choice([1, 2, 5])
    free = [rng.random() < 0.3 for _ in range(rows)] if seed % 2 else [False] * rows
    order = torch.stack([torch.randperm(HEADS, generator=g) for _ in range(rows)])
    start = tuple(torch.randn(rows, HEADS, fixed, D, generator=g, dtype=torch.float64) for _ in range(2))
    cached = layer(
        start, (order[:, :1], order[:, 1:]), (None, window), compensated, torch.tensor(free) if any(free) else None
    )

    def plain(row, head):
        limit = None if free[row] or head == int(order[row, 0]) else window
        return Plain([(start[0][row, head, i], start[1][row, head, i]) for i in range(fixed)], limit)

    told = {(r, h): [] for r in range(rows) for h in range(HEADS)}  # what each was given behind `fixed`
    total = fixed
    for _ in range(12):
        new = rng.choice([1, 1, 1, 2, 4])
        pads = [rng.randrange(new) for _ in range(rows)] if rng.random() < 0.4 else [0] * rows
        k, v = (torch.randn(rows, HEADS, new, D, generator=g, dtype=torch.float64) for _ in range(2))
        q = torch.randn(rows, 2 * HEADS, new, D, generator=g, dtype=torch.float64)
        cached.update(k, v)
        real = torch.arange(new) >= torch.tensor(pads)[:, None]
        cached.take(real if any(pads) else None)
        got, total = read(cached, q, SCALE), total + new
        assert got.shape == (rows, new, 2 * HEADS, D) and cached.get_seq_length() == total
        for (row, head), tokens in told.items():
            for i in range(pads[row], new):
                tokens.append((k[row, head, i], v[row, head, i]))
                want = plain(row, head)
                for token in tokens:
                    want.add(token)
                for group in range(2):
                    found = got[row, i, 2 * head + group]
                    expected = want.attend(q[row, 2 * head + group, i], compensated)
                    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        if not any(pads) and rng.random() < 0.5:
            back = rng.randrange(new + 1)
            cached.crop(-back)
            total -= back
            for key in told:
                told[key] = told[key][: len(told[key]) - back]
        widest = cached.classes[1].length
        assert any(free) or widest <= fixed + window + new - 1, "what left is freed"


def test_identical_tokens_that_left_are_read_as_if_they_were_there():
    """The compensation is exact where all that left is alike."""
    g = torch.Generator().manual_seed(0)
    first, late = (torch.randn(1, 1, n, D, generator=g, dtype=torch.float64) for n in (2, 3))
    alike = torch.randn(1, 1, 1, D, generator=g, dtype=torch.float64).expand(-1, -1, 9, -1)
    keys = torch.cat([first, alike, late], 2)
    values = torch.cat([first.flip(3), 2 * alike, -late], 2)
    heads = torch.zeros(1, 1, dtype=torch.int64)
    cached = layer((keys[:, :, :2], values[:, :, :2]), (heads,), (3,), True, None)
    for i in range(2, 14):
        cached.update(keys[:, :, i : i + 1], values[:, :, i : i + 1])
        cached.take()
        q = torch.randn(1, 2, 1, D, generator=g, dtype=torch.float64)
        got = read(cached, q, SCALE)
        want = torch.nn.functional.scaled_dot_product_attention(
            q, keys[:, :, : i + 1], values[:, :, : i + 1], scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(got, want.transpose(1, 2), atol=1e-6, rtol=1e-6)
    (held,) = cached.classes
    assert held.length == 5 and held.lost.count.tolist() == [9.0]


def test_rows_are_chosen_and_repeated_in_all_classes():
    g = torch.Generator().manual_seed(0)
    start = tuple(torch.randn(2, HEADS, 4, D, generator=g) for _ in range(2))
    heads = torch.tensor([[2], [0]]), torch.tensor([[0, 1], [1, 2]])

    def made():
        cached = layer(start, heads, (None, 3), True, torch.tensor([False, True]))
        for n in (2, 3):
            cached.update(*(torch.randn(2, HEADS, n, D, generator=torch.Generator().manual_seed(n)) for _ in range(2)))
            cached.take(torch.tensor([[True] * n, [False] + [True] * (n - 1)]))
        return cached

    def tensors(cached):
        return [t for c in cached.classes for t in (c.heads, c.real, c.exempt, *c.tensors()) if t is not None]

    want = tensors(made())
    for change, index in (
        (lambda x: x.reorder_cache(torch.tensor([1, 1])), [1, 1]),
        (lambda x: x.batch_select_indices(torch.tensor([False, True])), [1]),
        (lambda x: x.batch_repeat_interleave(2), [0, 0, 1, 1]),
    ):
        cached = made()
        change(cached)
        for got, all_rows in zip(tensors(cached), want, strict=True):
            assert torch.equal(got, all_rows[index])
    cached = made()
    cached.offload()
    cached.prefetch()
    assert all(torch.equal(x, y) for x, y in zip(tensors(cached), want, strict=True))
