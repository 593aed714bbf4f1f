"""The attention rows that stages inside the decoder are told beside the last prompt token's, against the stock models'
own maps."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from modes import families, greedy
from turns import IMAGE_TURNS, TURNS, conversation, second
from watchers import ATTENTION, OTHER, First, Watcher, dense, held_against, where

import vtoken
from vtoken.hooks.decoder import attention_facts
from vtoken.hooks.decoder.attention_facts import FUNCTIONS, causal

LAYERS = (1, 3)
ROWS = sorted({*FUNCTIONS} - {*ATTENTION, *OTHER})


def expected(model, batch, out, k, tail=0):
    """Fact -> per image what a stage before layer k must be told, from whole maps in float64."""
    want = {name: [] for name in ROWS}
    attention = out.attentions[k - 1].double()
    values = out.past_key_values.layers[k - 1].values.double()
    last = batch["input_ids"].shape[1] - 1 - tail
    for row, columns, _, later in where(model, batch):
        later = later[later <= last]
        a, v = attention[row], values[row]
        among = a[:, last, columns]
        # Where a window ends behind an image, the last token sees nothing of it.
        want["visual_attention"].append((among / among.sum(1, keepdim=True)).mean(0).nan_to_num())
        products = torch.stack([head[columns] @ head[last] for head in v]) * v.shape[-1] ** -0.5
        want["visual_value_attention"].append(products.softmax(1).mean(0))
        want["mean_value"].append(v[:, columns].mean(0))
        most, mean = a.amax(0), a.mean(0)
        want["cross_attention"].append(most[later][:, columns].mean(0) if len(later) else torch.zeros(len(columns)))
        want["self_attention"].append(most[columns][:, columns].mean(0))
        relayed = mean[later][:, later] @ mean[later][:, columns]
        want["relayed_attention"].append(relayed.mean(0) if len(later) else torch.zeros(len(columns)))
    return {name: [v.float() for v in values] for name, values in want.items()}


@families
@pytest.mark.parametrize("tail", [0, 3])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_rows_equal_the_stock_models(family, attn, tail):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    out, watcher = dense(model, batch), Watcher(asks=tuple(ROWS), seen={})
    model.set_attn_implementation(attn)
    with vtoken.wrapped(model, [watcher]), torch.no_grad():
        model(**batch, logits_to_keep=tail + 1)
    for k in LAYERS:
        want = expected(model, batch, out, k, tail)
        assert any(float(image.sum()) > 0 for image in want["cross_attention"])
        held_against(watcher.seen[k], want)


@families
@pytest.mark.parametrize("mode", ["static", "turn"])
def test_rows_over_other_caches(family, mode):
    """What a stage is told on a static cache, or of a second turn whose cache holds a pruned first one, is what the
    plain cache tells of the same layout, or what one long prompt tells."""
    if mode == "turn" and tiny.family(family).mrope and not IMAGE_TURNS:
        pytest.skip("transformers gives a new image in a cached turn the positions of text")
    model = tiny.make(family)
    rows = TURNS["image"] if mode == "turn" else (rows_for(family, "ragged"),)
    first = tiny.build(model, rows[0], seed=3)
    seen, order = [], []
    for other in (False, True):
        watcher = Watcher(at=(3,), asks=tuple(ROWS), seen={})
        # In a turn nothing is dropped, so that one long prompt is the definition.
        stages = [watcher] if mode == "turn" else [First(at=2), watcher]
        with vtoken.wrapped(model, stages):
            if mode == "static":
                greedy(model, first, 2, cache_implementation="static" if other else None)
            else:
                said = greedy(model, first, 2, return_dict_in_generate=True)
                turn = tiny.build(model, rows[1], seed=9)
                whole, order = conversation(model, first, turn, said.sequences)
                call = second(model, whole, turn) if other else whole
                greedy(model, call, 2, **({"past_key_values": said.past_key_values} if other else {}))
        seen.append(watcher.seen[3])
    plain, tried = seen
    new = [i for i, (_, number) in enumerate(order) if number == 1] or range(len(plain.lengths))
    for name in ROWS:
        a, b = (t.fact(name).split(t.lengths) for t in (plain, tried))
        a = [a[i] for i in new]
        torch.testing.assert_close(torch.cat(a), torch.cat(b), atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_chunks_of_queries_are_one(monkeypatch):
    """More queries than are held at once, over keys with padding."""
    monkeypatch.setattr(attention_facts, "CHUNK", 4 * 160 * 64)
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(4, 150, 8, generator=g), torch.randn(2, 160, 8, generator=g)
    ok = torch.arange(160) >= 7
    at = torch.arange(10, 160)
    parts = list(causal(q, k, ok, at, 0.3))
    assert [part.shape[2] for part in parts] == [64, 64, 22]
    got = torch.cat(parts, 2)
    scores = torch.einsum("hrd,hnd->hrn", q.double(), k.double().repeat_interleave(2, 0)) * 0.3
    mask = ok & (torch.arange(160) <= at[:, None])
    want = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(got.flatten(0, 1).double(), want, atol=1e-6, rtol=1e-5)
