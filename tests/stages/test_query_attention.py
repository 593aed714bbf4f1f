"""Attention of a layer's last queries, computed once for all stages that ask: how often, and with the same results."""

from __future__ import annotations

import pytest
import tiny
import torch
from modes import LOGITS, greedy, whole
from oracle_kv import attending

import vtoken
from vtoken.compressors._rows import last_rows, rows_at
from vtoken.stages import query_attention
from vtoken.stages.query_attention import QueryAttention, shared

ROWS = [[9, "img", 1, "img", 20], [1, "img", 30], [60]]
FLEX = {"flexprefill": {"gamma": 0.6, "min_budget": 1, "size": 16, "min_len": 0}}
ZIP = {"tau": 0.6, "recent": 4, "drawn": 6}
SHARE = {
    "same queries": [FLEX, {"snapkv": {"keep": 4, "window": 16}}],
    "some of them": [FLEX, {"snapkv": {"keep": 4, "window": 5}}],
    "the whole prompt": [FLEX, {"snapkv": {"keep": 24, "window": 8, "text": True}}],
    "zipvl": [{"zipvl": {**ZIP, "min_len": 0}}, {"zipvl_cache": ZIP}],
}
# More queries than were computed, other queries, other options: every stage computes its own.
ALONE = {
    "more queries": [FLEX, {"snapkv": {"keep": 4, "window": 20}}],
    "other queries": [FLEX, {"zipvl_cache": ZIP}],
    "other options": [{"zipvl": {**ZIP, "min_len": 0}}, {"zipvl_cache": {**ZIP, "tau": 0.8}}],
    "a prompt read whole": [{"flexprefill": {"size": 256, "min_len": 0}}, {"snapkv": {"keep": 4, "window": 16}}],
}


def qk(n=40, heads=4, kv_heads=2):
    g = torch.Generator().manual_seed(0)
    return torch.randn(heads, n, 8, generator=g), torch.randn(kv_heads, n, 8, generator=g)


@pytest.fixture
def passes(monkeypatch):
    """What was worked out: of all heads of a row, for zipvl key head by key head."""
    seen = []

    def spied(work):
        def spy(q, *arguments, **named):
            seen.append(work.__name__)
            return work(q, *arguments, **named)

        return spy

    monkeypatch.setattr(query_attention, "probe_sums", spied(query_attention.probe_sums))
    monkeypatch.setattr(query_attention, "received_attention", spied(query_attention.received_attention))
    monkeypatch.setattr("vtoken.compressors._zipvl.rows_at", spied(rows_at))
    return seen


def rows(q, k, count):
    """[Hk, H / Hk, count, N] attention of the last queries."""
    return last_rows(q, k.repeat_interleave(len(q) // len(k), 0), count, 0.3).unflatten(0, (len(k), -1))


@pytest.mark.parametrize(("announced", "left"), [(4, [4, 16]), (16, [16]), (17, [16]), (0, [16])])
def test_a_pass_leaves_what_was_announced(announced, left, passes):
    q, k = qk()
    p = QueryAttention(q, k, 0.3, announced)
    vertical, slash = p.lines(16)
    for n in (4, 16, 17, 17):
        torch.testing.assert_close(p.received(n), rows(q, k, n).sum(2))
    assert passes == ["probe_sums", *["received_attention"] * (3 - len(left))]
    torch.testing.assert_close(vertical, rows(q, k, 16).sum(2))
    torch.testing.assert_close(slash[..., 0], rows(q, k, 16)[..., -16:].diagonal(dim1=-2, dim2=-1).sum(-1))


def test_attention_of_a_row_is_causal_and_sums_to_one():
    q, k = qk()
    first = rows(q, k, 3)[0]
    assert first.sum(-1).flatten().tolist() == pytest.approx([1.0] * 6) and bool((first[:, 0, 38:] == 0).all())
    want = (k[0, :39].double() @ q[1, 38].double() * 0.3).softmax(0)
    torch.testing.assert_close(first[1, 1, :39].double(), want, atol=1e-6, rtol=1e-5)


def test_attention_of_other_tensors_is_not_taken():
    q, k = qk()
    p = QueryAttention(q, k, 0.3)
    assert shared(p, q, k, 0.3) is p and shared(p, q[:, :], k[:], 0.3) is p
    for other in ((q[:, 1:], k, 0.3), (q.clone(), k, 0.3), (q, k[:1], 0.3), (q, k, 0.5)):
        assert shared(p, *other) is not p
    assert shared(None, q, k, 0.3).q is q


def run(model, batch, stages):
    with vtoken.wrapped(model, stages):
        out, trace = greedy(model, batch, 4, **LOGITS), vtoken.trace(model)
    return torch.stack(out.logits), trace, [layer.keys for layer in attending(out.past_key_values)]


@whole
@pytest.mark.parametrize("name", [*SHARE, *ALONE])
def test_sharing_saves_the_second_pass_and_changes_nothing(family, name, passes, monkeypatch):
    model = tiny.make(family)
    batch, stages = tiny.build(model, ROWS, seed=3), {**SHARE, **ALONE}[name]
    logits, trace, keys = run(model, batch, stages)
    together = len(passes)
    heads = keys[0].shape[1]
    each = [heads if next(iter(stage)).startswith("zipvl") else 1 for stage in stages]
    monkeypatch.setattr(query_attention, "same", lambda a, b: False)
    apart = run(model, batch, stages)
    # The two rows with pictures are shrunk, and thinned (unless they are read whole).
    thinned, shrunk = (0 if name == "a prompt read whole" else 2) * each[0], 2 * each[1]
    layers = len(tiny.family(family).attending)
    assert len(passes) - together == layers * (thinned + shrunk)
    assert together == layers * (thinned + (0 if name in SHARE else shrunk))
    assert all(s.stood_aside is None for s in trace.stages)
    for mine, other in zip(trace.stages, apart[1].stages, strict=True):
        assert mine.density == other.density and mine.tokens_out == other.tokens_out
        assert all(torch.equal(a, b) for a, b in zip(mine.kept, other.kept, strict=True))
    # Sums that a pass leaves may round otherwise than those of a pass of its own.
    exact = name not in ("same queries", "some of them", "the whole prompt")
    for mine, other in zip([logits, *keys], [apart[0], *apart[2]], strict=True):
        torch.testing.assert_close(mine, other, **({"atol": 0, "rtol": 0} if exact else {"atol": 1e-5, "rtol": 1e-4}))
    assert sum(trace.cached[0]) < sum(trace.prompt_tokens)
