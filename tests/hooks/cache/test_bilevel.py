"""Bi-level KV on every family: whole models against the stock layers, whose caches are pooled by hand on keys that were
never rotated."""

from __future__ import annotations

import sys

import oracle
import pytest
import tiny
import torch
from modes import LOGITS, alone, greedy, mrope, whole
from oracle_kv import Told, attending
from turns import conversation, second

import vtoken
from vtoken.compressors.cache.bilevel_kv import BilevelKV
from vtoken.errors import UnsupportedError
from vtoken.stages.attention import Rope

ROWS = [[2, "img", 1, "img", 2, "img", "img", 5], [1, "img", 2, "img", 1, "img", 7], [4]]
POOLED = {"frames": 1, "top": 1, "pool": 4}
NEW = 4


class Stock:
    """The stock layers on one row, and what they would cache without RoPE."""

    def __init__(self, model):
        self.model, self.lm = model, model.get_decoder()
        self.cache, self.bare = cache_of(model), cache_of(model)

    @torch.no_grad()
    def run(self, x, positions, deep=()):
        """[1, n, V]; x sees all that is held, and is then held, too."""
        rope = self.lm.rotary_emb(x, positions)
        none = (torch.ones_like(rope[0]), torch.zeros_like(rope[1]))
        for k, layer in enumerate(self.lm.layers):
            mask = None
            if hasattr(layer, "self_attn"):
                past, n = self.cache.get_seq_length(k), x.shape[1]
                mask = torch.ones(n, past + n, dtype=torch.bool).tril(past)[None, None]
                norm = getattr(layer, "input_layernorm", None) or layer.operator_norm
                self.bare.layers[k].lazy_initialization(x, x)
                before = torch.ones(n, n, dtype=torch.bool).tril()[None, None]
                fresh = cache_of(self.model)
                layer.self_attn(norm(x), position_embeddings=none, attention_mask=before, past_key_values=fresh)
                self.bare.layers[k] = fresh.layers[k]
            x = layer(x, attention_mask=mask, position_embeddings=rope, position_ids=None, past_key_values=self.cache)
            if k < len(deep):
                x = x + deep[k]
        self.rope = rope
        return self.model.lm_head(tiny.normed(self.model, x))

    def pool(self, calls, row, begin):
        """Everything from slot `begin` on, of which the decisions say who goes to whom."""
        for k, given in calls.items():
            layer, hold = given[row]
            cached, bare = self.cache.layers[k], self.bare.layers[k].keys[0]
            torch.testing.assert_close(cached.keys[0, :, begin:], layer.keys, atol=1e-4, rtol=1e-4)
            rotate = sys.modules[type(self.lm.layers[k].self_attn).__module__].apply_rotary_pos_emb
            keys, values = [], []
            for j, middle in enumerate(hold.index[0].tolist()):
                group = (hold.into[0] == j).nonzero()[:, 0].tolist() if hold.into is not None else [middle]
                assert middle == group[(len(group) - 1) // 2]
                mean = bare[:, group].mean(1)[None, :, None]
                cos, sin = (t[:, middle : middle + 1] for t in self.rope)
                keys.append(rotate(mean, mean, cos, sin)[0][0, :, 0])
                values.append(cached.values[0, :, begin:][:, group].mean(1))
            for name, new in (("keys", keys), ("values", values)):
                old = getattr(cached, name)[:, :, :begin]
                setattr(cached, name, torch.cat([old, torch.stack(new, 1)[None]], 2))


def cache_of(model):
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def row_of(p, row):
    real = p.mask[row]
    return (
        p.embeds[row : row + 1, real],
        p.positions[..., row : row + 1, real],
        [d[row : row + 1, real] for d in p.deep],
    )


def say(stock, first, tokens, position, shape):
    """Logits of the stock layers while they are made to say `tokens`; the first ones are given."""
    want = [first]
    for step, token in enumerate(tokens[:-1]):
        x = stock.model.get_input_embeddings()(torch.tensor([[token]]))
        want.append(stock.run(x, (position + 1 + step).expand(*shape, 1)))
    return torch.cat(want, 1)[0]


@whole
def test_equals_the_stock_layers_on_pooled_caches(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    p, spy = oracle.prompt(model, batch), Told(BilevelKV, **POOLED)
    with vtoken.wrapped(model, [spy.stage]):
        got, trace = greedy(model, batch, NEW, **LOGITS), vtoken.trace(model)
    assert trace.layers == [trace.visual_tokens] * 4
    pooled = 0
    for row in range(2):
        stock = Stock(model)
        x, positions, deep = row_of(p, row)
        first = stock.run(x, positions, deep)[:, -1:]
        stock.pool(spy.calls, row, 0)
        left = [layer.keys.shape[2] for layer in attending(stock.cache)]
        assert left == [each[row] for each in trace.cached]
        pooled += x.shape[1] - left[0]
        want = say(stock, first, got.sequences[row, -NEW:].tolist(), positions.max(), positions.shape[:-1])
        torch.testing.assert_close(torch.stack(got.logits)[:, row], want, atol=3e-4, rtol=1e-4)
    assert pooled > 0
    mine = [s for s in trace.stages if s.site == "cache"]
    gone = sum(mine[0].tokens_in) - sum(mine[0].tokens_out)
    assert sum(trace.prompt_tokens) - sum(trace.cached[0]) == gone == pooled
    cache = got.past_key_values
    assert [layer.keys.shape[2] for layer in attending(cache)] == [max(left) + NEW - 1 for left in trace.cached]


@whole
@pytest.mark.parametrize("kind", ["text", "images"])
def test_second_turn(family, kind):
    """A turn reads the pooled cache of the one before, and pools what it adds itself and nothing else."""
    model = tiny.make(family)
    several = 1 if tiny.family(family).crops_one_only else 4  # such models are told how many a whole row holds
    more = [[5] if kind == "text" else [3, *["img"] * several, 2]] * 2
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, more, seed=9)
    pictures = tiny.family(family).pixels in turn
    if pictures and mrope(model):
        pytest.importorskip("transformers", minversion="5.21", reason="older transformers numbers a new image as text")
    spy = Told(BilevelKV, **POOLED)
    with vtoken.wrapped(model, [spy.stage]):
        a = greedy(model, first, NEW, return_dict_in_generate=True)
        calls = dict(spy.calls)
        spy.calls.clear()
        everything, _ = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, everything, turn), NEW, past_key_values=a.past_key_values, **LOGITS)
    assert bool(spy.calls) == pictures
    p = oracle.prompt(model, everything)
    for row in range(2):
        stock, (x, positions, deep) = Stock(model), row_of(p, row)
        prompt = int(first["attention_mask"][row].sum())
        begin = prompt + NEW - 1
        stock.run(x[:, :prompt], positions[..., :prompt], [d[:, :prompt] for d in deep])
        stock.pool(calls, row, 0)
        stock.run(x[:, prompt:begin], positions[..., prompt:begin])
        left = attending(stock.cache)[0].keys.shape[2]
        start = stock.run(x[:, begin:], positions[..., begin:], [d[:, begin:] for d in deep])[:, -1:]
        if pictures:
            stock.pool(spy.calls, row, left)
        said = b.sequences[row, -NEW:].tolist()
        want = say(stock, start, said, positions.max(), positions.shape[:-1])
        torch.testing.assert_close(torch.stack(b.logits)[:, row], want, atol=3e-4, rtol=1e-4)


@whole
def test_batch_equals_single(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [{"uniform": {"keep": "70%"}}, {"bilevel_kv": {**POOLED, "pool": 3}}]):
        together, trace = greedy(model, batch), vtoken.trace(model)
        for row in range(3):
            assert torch.equal(greedy(model, alone(model, batch, row))[0, -6:], together[row, -6:])
            single = vtoken.trace(model)
            if row < 2:
                assert [left[0] for left in single.cached] == [left[row] for left in trace.cached]
                mine = [i for i, r in enumerate(trace.row) if r == row]
                assert [trace.kept[i].tolist() for i in mine] == [k.tolist() for k in single.kept]


@pytest.mark.parametrize("family", tiny.families(states=(), window=None))
def test_drafts_and_beams(family):
    """Drafts that are verified in the prefill read the pooled cache, too; beams share it."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    with vtoken.wrapped(model, [{"bilevel_kv": POOLED}]):
        plain, cached = greedy(model, batch, 8), vtoken.trace(model).cached
        assert torch.equal(greedy(model, batch, 8, prompt_lookup_num_tokens=3), plain)
        assert vtoken.trace(model).cached == cached and cached[0][0] < vtoken.trace(model).prompt_tokens[0]
        assert torch.equal(greedy(model, batch, 8, assistant_model=tiny.make(family)), plain)


@whole
def test_one_chunk_is_the_identity(family):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = greedy(model, batch, **LOGITS)
    for options in ({}, {**POOLED, "pool": 1}, {**POOLED, "top": 2}):
        with vtoken.wrapped(model, [{"bilevel_kv": options}]):
            got = greedy(model, batch, **LOGITS)
        assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


def test_a_video_is_cut_by_its_frames():
    """Behind stages that drop tokens and behind chunk_prefill."""
    family = tiny.families(leading=True, mrope=True)[0]
    model = tiny.make(family)
    batch = tiny.build(model, [[3, ("video", 16), 9]], seed=3)
    bilevel = {"bilevel_kv": {"frames": 2, "top": 1, "pool": 2}}
    sizes = []
    for before in ([], [{"random": {"keep": "60%"}}, {"chunk_prefill": {"frames": 2, "previous": 0, "min_len": 0}}]):
        with vtoken.wrapped(model, [*before, bilevel]):
            greedy(model, batch)
            trace = vtoken.trace(model)
        ((frames, *sides),) = trace.parts[0]
        assert frames > 4 and all(c[0] < trace.prompt_tokens[0] for c in trace.cached)
        sizes.append(trace.cached[-1][0])
        kept = [s.kept[0] for s in trace.stages if s.site == "cache"]
        size = sides[0] * sides[1]
        there = [s.kept[0] for s in trace.stages if s.site == "tokens"] or [torch.arange(frames * size)]
        left = set((there[0] // size).tolist())
        assert all(set((k // size).tolist()) == left for k in kept), "something of every frame is still there"
    assert sizes[1] < sizes[0]


def test_an_attention_that_rotates_otherwise_is_refused():
    model = tiny.make("llava")
    for layer in model.get_decoder().layers:
        layer.self_attn.more = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match=r"bilevel_kv needs queries and keys from before RoPE.*of site cache"):
        vtoken.wrap(model, ["bilevel_kv"])


def test_turning_to_a_place_undoes_turning_from_it():
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    angles = torch.arange(9)[:, None] * 10_000.0 ** -torch.arange(0, 1, 0.25)
    rope = Rope(angles.cos().repeat(1, 2), angles.sin().repeat(1, 2), apply_rotary_pos_emb)
    x = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([[8, 0, 3], [1, 1, 7]])
    turned = rope.turn_to(x.gather(1, index[..., None].expand(-1, -1, 8)), index)
    torch.testing.assert_close(turned, rope.turn(x).gather(1, index[..., None].expand(-1, -1, 8)))
