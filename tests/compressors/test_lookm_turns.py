"""LOOK-M's merging in a conversation: a turn reads the merged cache of the one before, and merges what it adds itself and nothing else."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from modes import greedy, mrope, whole
from oracle_kv import Told
from torch import Tensor
from transformers import DynamicCache
from turns import conversation, second

import vtoken
from vtoken.compressors.cache.lookm import LookM

IMPORTANT, RECENT, NEW = 9, 3, 4
FIRST = [[3, "img", 5], [1, "img", 2, "img", 7]]


@whole
@pytest.mark.parametrize("merge", ["averaged", "pivotal", "weighted"])
@pytest.mark.parametrize("more", [[[5], [5]], [[3, "img", 2], [3, "img", 2]]], ids=["text", "image"])
def test_second_turn_equals_a_loop_on_the_stock_layers(family, merge, more):
    model = tiny.make(family)
    first, turn = tiny.build(model, FIRST, seed=3), tiny.build(model, more, seed=9)
    pictures = tiny.family(family).pixels in turn
    if pictures and mrope(model):
        pytest.importorskip("transformers", minversion="5.21", reason="older transformers numbers a new image as text")
    spy = Told(LookM, important=IMPORTANT, recent=RECENT, merge=merge)
    with vtoken.wrapped(model, [spy.stage]):
        a = greedy(model, first, NEW, return_dict_in_generate=True)
        calls = [dict(spy.calls)]
        spy.calls.clear()
        whole, _ = conversation(model, first, turn, a.sequences)
        given = second(model, whole, turn)
        b = greedy(
            model, given, NEW, past_key_values=a.past_key_values, return_dict_in_generate=True, output_logits=True
        )
        calls.append(spy.calls)
    assert bool(calls[1]) == pictures
    p = oracle.prompt(model, whole)
    for row in range(2):
        x, positions, deep = of(p, row)
        visual, cache = p.visual[row, p.mask[row]], DynamicCache(config=model.config)
        prompt = int(first["attention_mask"][row].sum())
        begin = prompt + NEW - 1
        run(model, cache, x[:, :prompt], positions[..., :prompt], [d[:, :prompt] for d in deep])
        shrink(cache, 0, calls[0], row, visual[:prompt], merge)
        merged = cache.layers[-1].keys.shape[2]
        run(model, cache, x[:, prompt:begin], positions[..., prompt:begin])
        want = [run(model, cache, x[:, begin:], positions[..., begin:], [d[:, begin:] for d in deep])[:, -1:]]
        if pictures:
            shrink(cache, merged + NEW - 1, calls[1], row, visual[begin:], merge)
        assert merged < prompt and cache.layers[-1].keys.shape[2] < x.shape[1]
        said = b.sequences[row : row + 1, -NEW:-1]
        after = positions.max() + 1 + torch.arange(NEW - 1)
        after = after.expand(*positions.shape[:-1], -1)
        want.append(run(model, cache, model.get_input_embeddings()(said), after))
        torch.testing.assert_close(torch.stack(b.logits)[:, row], torch.cat(want, 1)[0], atol=3e-4, rtol=1e-4)


def of(p: oracle.PrefillQK, row: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Embeddings, positions and what DeepStack adds, without the padding of the row."""
    real = p.mask[row]
    return (
        p.embeds[row : row + 1, real],
        p.positions[..., row : row + 1, real],
        [d[row : row + 1, real] for d in p.deep],
    )


@torch.no_grad()
def run(model, cache: DynamicCache, x: Tensor, positions: Tensor, deep=()) -> Tensor:
    """[1, n, V] of the stock layers on more tokens, which see everything that the cache holds; it then holds them,
    too."""
    lm = model.get_decoder()
    rope = lm.rotary_emb(x, positions)
    for k, layer in enumerate(lm.layers):
        mask = None
        if hasattr(layer, "self_attn"):
            past, n = cache.get_seq_length(k), x.shape[1]
            mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)[None, None]
        x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None, past_key_values=cache)
        if k < len(deep):
            x = x + deep[k]
    return model.lm_head(tiny.normed(model, x))


def shrink(cache: DynamicCache, begin: int, calls, row: int, visual: Tensor, merge: str) -> None:
    """What every layer holds from slot `begin` on, by hand; of the stage only the queries are taken."""
    for k, (layer, _) in ((k, told[row]) for k, told in calls.items()):
        held = cache.layers[k]
        new = [t[0, :, begin:] for t in (held.keys, held.values)]
        torch.testing.assert_close(new[0], layer.keys, atol=1e-4, rtol=1e-4)
        new = look_m(*new, layer.queries, visual.tolist(), layer.scale, merge)
        held.keys, held.values = (
            torch.cat([t[:, :, :begin], n[None]], 2) for t, n in zip((held.keys, held.values), new, strict=True)
        )


def look_m(keys: Tensor, values: Tensor, queries: Tensor, visual: list[bool], scale: float, merge: str):
    """The paper, one KV head and one token after the other."""
    heads, n, _ = keys.shape
    found = [[], []]
    for h, asked in enumerate(queries.unflatten(0, (heads, -1)).double()):
        key, total = keys[h].double(), torch.zeros(n, dtype=torch.float64)
        for q in asked:
            for i in range(n):
                total[: i + 1] += (key[: i + 1] @ q[i] * scale).softmax(0)
        words = [i for i in range(n - RECENT) if not visual[i]]
        rivals = sorted((i for i in range(n - RECENT) if visual[i]), key=lambda i: -total[i])
        kept = sorted([*words, *rivals[: max(0, IMPORTANT - len(words))], *range(n - RECENT, n)])
        nearest = {}
        for e in set(range(n)) - set(kept):
            alike = [float(torch.cosine_similarity(key[e], key[t], dim=0)) for t in kept]
            nearest[e] = max(alike), kept[alike.index(max(alike))]
        mean = sum(a for a, _ in nearest.values()) / len(nearest)
        for side, x in zip(found, (keys[h].double(), values[h].double()), strict=True):
            side.append([folded(x, t, nearest, mean, merge) for t in kept])
    return [torch.stack([torch.stack(head) for head in side]).float() for side in found]


def folded(x: Tensor, t: int, nearest: dict[int, tuple[float, int]], mean: float, merge: str) -> Tensor:
    """A kept token with what goes to it: their mean, each first averaged with it (pivotal) or multiplied by its
    similarity (weighted); but for pivotal only what is at least as similar as the mean."""
    parts = [x[t]]
    for e, (alike, into) in nearest.items():
        if into == t and (merge == "pivotal" or alike >= mean):
            parts.append({"averaged": x[e], "pivotal": (x[e] + x[t]) / 2, "weighted": alike * x[e]}[merge])
    return torch.stack(parts).mean(0)
