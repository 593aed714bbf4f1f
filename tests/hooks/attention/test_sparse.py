"""Site attention: sparse prefill on every family, and when it stands aside."""

from __future__ import annotations

import json

import flash_stand_in
import pytest
import tiny
import torch
from batches import long, rows_for
from modes import LOGITS, alone, greedy, whole
from sparse_probes import Everything, Ladder
from transformers import LlamaConfig

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.stages.attention import SparseAttention, SparseMask, everything


@whole
@pytest.mark.parametrize("batch", ["one", "ragged"])
def test_reading_everything_changes_no_bit(family, batch):
    model = tiny.make(family)
    batch = tiny.build(model, long(family) if batch == "one" else rows_for(family, batch), seed=3)
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, [Everything()]):
        got = greedy(model, batch, **LOGITS)
        stages = vtoken.trace(model).stages
    assert tuple(s.layer for s in stages) == tiny.family(family).attending and all(
        s.density == [1.0] * len(batch["input_ids"]) for s in stages
    )
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)) or batch["attention_mask"].min() == 0
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=1e-4, rtol=1e-4)
    assert torch.equal(got.sequences, want.sequences)


def masked(model, batch, kept=None):
    """Logits of one unpadded row whose prefill attention is masked as Ladder reads, by the model's eager-like
    backend."""
    lm, calls = model.get_decoder(), []
    from transformers import AttentionInterface

    def attend(module, q, k, v, mask, scaling=None, **kwargs):
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = q @ k.transpose(-1, -2) * scaling
        n = q.shape[2]
        if n > 1:
            scores = scores.masked_fill(~Ladder.mask(n, q.shape[1]), -torch.inf)
            calls.append(module.layer_idx)
        return (scores.softmax(-1) @ v).transpose(1, 2).contiguous(), None

    AttentionInterface.register("known_ladder", attend)
    before = lm.config._attn_implementation
    lm.config._attn_implementation_internal = "known_ladder"
    try:
        return greedy(model, batch, **LOGITS)
    finally:
        lm.config._attn_implementation_internal = before
        assert tuple(calls) == tiny.family(model).attending


@whole
@pytest.mark.parametrize("backend", ["sdpa", "eager", flash_stand_in.NAME])
def test_equals_masked_attention(family, backend):
    model = tiny.make(family)
    batch = tiny.build(model, long(family), seed=3)
    want = masked(model, batch)
    model.get_decoder().config._attn_implementation_internal = backend
    with vtoken.wrapped(model, [Ladder()]):
        got = greedy(model, batch, **LOGITS)
        density = vtoken.trace(model).stages[0].density[0]
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), atol=2e-4, rtol=1e-4)
    assert torch.equal(got.sequences, want.sequences) and 0.3 < density
    if tiny.family(family).gaps_for_flash:
        model.get_decoder().config._attn_implementation_internal = "sdpa"
    dense = greedy(model, batch, **LOGITS)
    assert not torch.allclose(torch.stack(dense.logits)[0], torch.stack(want.logits)[0], atol=1e-2)


@whole
def test_rows_of_a_batch_do_not_see_each_other(family):
    """A ragged batch, pruned before and inside the decoder, row by row: logits and decisions are those of the rows
    alone."""
    model = tiny.make(family)
    batch = tiny.build(model, [[9, "img", 1, "img", 20], [1, "img", 30], [60]], seed=3)
    stages = [{"fastervlm": {"keep": "80%"}}, {"fastv": {"keep": 5, "layer": 2}}, Ladder()]
    with vtoken.wrapped(model, stages):
        got = greedy(model, batch, **LOGITS)
        trace = vtoken.trace(model)
        for row in (0, 1):
            one = greedy(model, alone(model, batch, row), **LOGITS)
            torch.testing.assert_close(
                torch.stack(one.logits)[:, 0], torch.stack(got.logits)[:, row], atol=1e-4, rtol=1e-4
            )
            single = [s for s in vtoken.trace(model).stages if s.site == "attention"]
            whole = [s for s in trace.stages if s.site == "attention"]
            assert [s.density[0] for s in single] == [s.density[row] for s in whole]
    order = [(s.site, s.layer) for s in trace.stages]
    layers = tiny.family(family).attending
    first, then = ([("attention", k) for k in layers if (k < 2) == early] for early in (True, False))
    assert order[1:] == [*first, ("decoder", 2), *then]
    for before, after in zip(trace.stages, trace.stages[1:], strict=False):
        assert after.tokens_in == before.tokens_out
    assert whole[0].density[0] < 1 and whole[0].tokens_out != whole[-1].tokens_out == [5, 5, 5]


@whole
def test_what_a_stage_is_told(family):
    """Image and place of every token, after pruning."""
    model = tiny.make(family)
    batch = tiny.build(model, [[2, "img", 5], [1, "img", 2, "img", 7]], seed=3)
    stage = Ladder(seen=[])
    with vtoken.wrapped(model, [{"uniform": {"keep": 3}}, {"fastv": {"keep": 2, "layer": 2}}, stage]):
        greedy(model, batch, 1)
        trace = vtoken.trace(model)
    entries = [s for s in trace.stages if s.site == "attention"]
    assert [(p.layer, p.heads) for p in stage.seen] == [(k, 4) for k in tiny.family(family).attending for _ in range(2)]
    for number, prompt in enumerate(stage.seen):
        entry, row = entries[number // 2], number % 2
        each = 3 if prompt.layer < 2 else 2
        images = [i for i, r in enumerate(trace.row) if r == row]
        assert prompt.image[prompt.image >= 0].tolist() == [i for i in images for _ in range(each)]
        assert prompt.raster_index[prompt.image >= 0].tolist() == [p for i in images for p in entry.kept[i].tolist()]
        assert bool((prompt.raster_index[prompt.image < 0] == -1).all()) and prompt.parts == tuple(trace.parts)
        assert int(prompt.image[-1]) == -1, "text at the end"
        if number < 2:
            assert prompt.length == trace.prompt_tokens[row]
        if not (tiny.family(family).anyres or tiny.family(family).unit > 1):
            assert prompt.image[:3].tolist() == ([-1, -1, 0] if row == 0 else [-1, 1, 1])


@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_modes(family):
    """Static caches, beams, drafts and scored answers give what plain generation gives."""
    model = tiny.make(family)
    batch = tiny.build(model, long(family), seed=3)
    with vtoken.wrapped(model, [{"fastervlm": {"keep": "80%"}}, Ladder()]):
        plain = greedy(model, batch)
        assert torch.equal(greedy(model, batch, cache_implementation="static"), plain)
        one = {k: v for k, v in batch.items() if k != "attention_mask"}
        assert torch.equal(greedy(model, one, prompt_lookup_num_tokens=3), plain)
        assert greedy(model, batch, num_beams=2).shape == plain.shape
        logits = greedy(model, batch, **LOGITS).logits
        answer = plain[:, -6:-1]
        scored = {**batch, "input_ids": plain[:, :-1]}
        scored["attention_mask"] = torch.ones_like(scored["input_ids"])
        if "mm_token_type_ids" in batch:
            scored["mm_token_type_ids"] = torch.nn.functional.pad(batch["mm_token_type_ids"], (0, 5))
        with torch.no_grad():
            got = model(**scored, logits_to_keep=6).logits[0]
        torch.testing.assert_close(got, torch.stack(logits)[:, 0], atol=1e-4, rtol=1e-4)
        assert answer.shape[1] == 5


@whole
def test_text_turns_and_short_prompts_keep_the_models_own(family):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    text = tiny.build(model, [[40]], seed=1)
    want, words = greedy(model, batch, **LOGITS), greedy(model, text)
    with vtoken.wrapped(model, [Ladder(min_len=1000)]):
        got = greedy(model, batch, **LOGITS)
        (entry,) = vtoken.trace(model).stages
        assert torch.equal(greedy(model, text), words) and not vtoken.trace(model).stages
    longest = int(batch["attention_mask"].sum(1).max())
    assert entry.stood_aside == f"the prompt has {longest} tokens, fewer than min_len 1000" and entry.layer is None
    assert not entry.density and entry.milliseconds == 0 and entry.tokens_in == entry.tokens_out
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


def test_min_len_holds_row_by_row():
    model = tiny.make("llava")
    batch = tiny.build(model, [[9, "img", 9], [1, "img", 30]], seed=3)
    with vtoken.wrapped(model, [Ladder(min_len=40)]):
        got = greedy(model, batch, **LOGITS)
        stages = vtoken.trace(model).stages
    assert len(stages) == 4 and all(s.density[0] == 1.0 > s.density[1] for s in stages)
    short = int(batch["attention_mask"][0].sum())
    want = [f"the row has {short} tokens, fewer than min_len 40", None]
    assert all(s.rows_aside == want and s.stood_aside is None for s in stages)
    assert json.loads(json.dumps(stages[0].to_dict()))["rows_aside"] == want
    dense = greedy(model, batch, **LOGITS)
    torch.testing.assert_close(torch.stack(got.logits)[:, 0], torch.stack(dense.logits)[:, 0], atol=1e-4, rtol=1e-4)


def test_rows_without_pictures_are_left_alone():
    """As they are in a batch of their own."""
    model = tiny.make("llava")
    batch = tiny.build(model, [[40, "img", 9], [80]], seed=3)
    with vtoken.wrapped(model, [Ladder(min_len=0)]):
        got = greedy(model, batch, **LOGITS)
        for stage in vtoken.trace(model).stages:
            assert stage.rows_aside == [None, "the row has no image"] and stage.density[1] == 1.0 > stage.density[0]
    with vtoken.wrapped(model, [Ladder(min_len=70)]):
        greedy(model, batch, 1)
        (stage,) = vtoken.trace(model).stages
        assert stage.stood_aside == "the prompt has 65 tokens, fewer than min_len 70", "the text's 80 do not count"
    dense = greedy(model, batch, **LOGITS)
    torch.testing.assert_close(torch.stack(got.logits)[:, 1], torch.stack(dense.logits)[:, 1], atol=1e-4, rtol=1e-4)


def test_rows_below_both_thresholds():
    """Row 0 is long and holds too few visual tokens, row 1 the other way round, row 2 is thinned."""
    model = tiny.make("llava")
    rows = [[60, "img", 9], [1, "img", "img", 2], [1, "img", 20, "img", 2]]
    batch = tiny.build(model, rows, seed=3)
    dense = greedy(model, batch, **LOGITS)
    few = "16 visual tokens are fewer than min_visual_tokens 32"
    with vtoken.wrapped(model, {"min_visual_tokens": 32, "stages": [Ladder(min_len=40)]}):
        got = greedy(model, batch, **LOGITS)
        for stage in vtoken.trace(model).stages:
            assert stage.rows_aside == [few, "the row has 35 tokens, fewer than min_len 40", None]
            assert [d == 1.0 for d in stage.density] == [True, True, False]
        greedy(model, tiny.build(model, rows[:2], seed=3))
        (stage,) = vtoken.trace(model).stages
        assert stage.stood_aside == "the prompt has 35 tokens, fewer than min_len 40" and not stage.rows_aside
        assert vtoken.trace(model).dense_rows == [0]
    for row in (0, 1):
        logits = [torch.stack(out.logits)[:, row] for out in (got, dense)]
        torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_other_reasons():
    model = tiny.make("llava", "eager")
    batch = tiny.build(model, [[3, "img", 1, "img", 9], [2, "img", 3]], seed=3)
    right = {**batch}
    for name in ("input_ids", "attention_mask"):
        right[name] = torch.stack(
            [row.roll(int(m.sum())) for row, m in zip(batch[name], batch["attention_mask"], strict=True)]
        )
    first = tiny.build(model, [[3, "img", 9]], seed=3)
    second = tiny.build(model, [[3, "img", 9]], seed=4)

    def reason():
        (entry,) = vtoken.trace(model).stages
        return entry.stood_aside

    with vtoken.wrapped(model, [Ladder()]):
        with torch.no_grad():
            model(**right)
            assert "padded on the right" in reason()
            out = model(**first, use_cache=True)
            assert [s.layer for s in vtoken.trace(model).stages] == [0, 1, 2, 3]
            more = {**second, "attention_mask": torch.ones(1, 56, dtype=torch.long)}
            model(**more, past_key_values=out.past_key_values)
            assert reason() == "the cache holds 28 tokens already; only a prompt that comes in one piece is thinned"
        model.train()
        model(**first)
        assert reason() == "the model is in training mode"
        model.train(False)
        model(**first).logits.sum().backward()
        assert model.get_decoder().layers[0].self_attn.q_proj.weight.grad.abs().sum() > 0


def test_layers_are_shared_out():
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 1, "img", 9]], seed=3)
    with vtoken.wrapped(model, [Ladder(dense_layers=(0, -1)), Everything(dense_layers=(1, 2))]):
        greedy(model, batch, 1)
        assert [(s.name, s.layer) for s in vtoken.trace(model).stages] == [
            (Everything.name, 0),
            (Ladder.name, 1),
            (Ladder.name, 2),
            (Everything.name, 3),
        ]

    class Plain(vtoken.stages.Compressor):
        site = "attention"

    class Bad(Ladder):
        def reads(self, prompt):
            return SparseMask(16, torch.ones(4, 1, 1, dtype=torch.bool))

    class Odd(SparseAttention):
        name = "bad"
        min_len: int = 0
        more: dict

        def reads(self, prompt):
            n = prompt.length
            return SparseMask(16, everything(4, n, n, 16, prompt.q.device), **self.more)

    for stages, message in (
        ([Ladder(), Everything()], "both thin the attention of decoder layer 0"),
        ([Ladder(dense_layers=(4,))], "layers 0 to 3"),
        ([Ladder(dense_layers=(0, 1, 2, 3))], "must be left"),
        ([Plain()], "SparseAttention"),
        ([{"proxyattn": {"proxies": 3}}], "3 proxies cannot share out 4 query heads on 2 key heads"),
        ([{"mminference": {"heads": [["a_shape"] * 4] * 3}}], "for 3 decoder layers, this model has 4"),
        (
            [{"mminference": {"heads": [["a_shape"] * 4, *[["a_shape"] * 2] * 3]}}],
            "for 2 heads in a layer, this model has 4",
        ),
        ([{"static_sparse": {"gates": [[0.1, 0.2]] * 3}}], "for 3 decoder layers, this model has 4"),
        ([{"static_sparse": {"gates": [[0.1] * 4] * 4}}], "for 4 key heads in a layer, this model has 2"),
    ):
        with pytest.raises(UnsupportedError, match=message):
            vtoken.wrap(model, stages)
    with pytest.raises(UnsupportedError, match="width 512; at most 256"):
        vtoken.wrap(tiny.make("llava", hidden_size=32, head_dim=512), [Ladder()])
    with vtoken.wrapped(model, [Bad()]), pytest.raises(ValueError, match="returned blocks"):
        greedy(model, batch, 1)
    lists = torch.zeros(4, 1, 3, dtype=torch.int32)
    for more, words in (
        ({"columns": lists[:1]}, r"need \[H, lists, keys\] of 4 heads"),
        ({"columns": lists}, "with share 1: need lists for"),
        ({"columns": lists, "of": torch.zeros(1, dtype=torch.int32)}, "need the list of each of"),
        ({"dense": torch.zeros(4, 1, dtype=torch.bool)}, "dense .* must be bool"),
        ({"own": torch.zeros(1)}, "own .* must be bool"),
    ):
        with vtoken.wrapped(model, [Odd(more=more)]), pytest.raises(ValueError, match=f"stage bad returned .*{words}"):
            greedy(model, batch, 1)
    assert torch.equal(greedy(model, batch), greedy(model, batch))


def test_unwrap_takes_the_taps_away():
    model = tiny.make("llava")
    modules = [layer.self_attn for layer in model.get_decoder().layers]
    before = [dict(vars(m)) for m in modules]
    with vtoken.wrapped(model, [{"fastv": {"keep": 5, "layer": 2}}, Ladder()]):
        assert all("vtoken_tap" in vars(m) for m in modules)
    assert [dict(vars(m)) for m in modules] == before


def test_blocks_that_are_too_small_for_the_longest_prompt_are_refused() -> None:
    """Maps of 28 heads at 128k tokens: 9.4 GB in blocks of 16, 2.3 GB in blocks of 32."""
    from vtoken.hooks.attention.sparse_prefill import check_maps

    decoder = LlamaConfig(hidden_size=3584, num_attention_heads=28, max_position_embeddings=131072)
    with pytest.raises(UnsupportedError, match=r"flexprefill: .*size to 32 or more, or max_position_embeddings"):
        check_maps(registry.stage("flexprefill")(size=16), decoder)
    check_maps(registry.stage("flexprefill")(size=32), decoder)
    check_maps(
        registry.stage("flexprefill")(size=16),
        LlamaConfig(hidden_size=3584, num_attention_heads=28, max_position_embeddings=32768),
    )
