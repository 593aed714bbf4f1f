"""Stages that choose what a generated token reads: every family, ragged batches, all ways of generating, against a
stock model whose attention reads what a literal loop says."""

from __future__ import annotations

import oracle
import pytest
import tiny
import torch
from batches import inside
from literal_decode import literal, reading, visual_slots
from modes import LOGITS, alone, attending, greedy, mrope, whole
from probes import Deep
from turns import conversation, second

import vtoken
from vtoken import registry

ROWS = [[3, "img", 5], [1, "img", 2, "img", 7], [4]]
STAGES = {
    "quest": ("quest", {"keep": 4, "size": 2, "dense_layers": (0,)}),
    "quest share": ("quest", {"keep": "40%", "size": 3, "dense_layers": ()}),
    "lserve": ("quest", {"keep": 4, "size": 4, "chunks": 2, "every": 3, "dense_layers": (0,)}),
    "tidal": ("tidal", {"keep": 3, "layer": 1, "correction": 3}),
    "tidal once": ("tidal", {"keep": 2, "layer": 0, "correction": None}),
    "recycled": ("recycled", {"keep": 3, "every": 3}),
    "recycled alike": ("recycled", {"keep": 3, "every": 5, "similarity": 0.7, "check": 2}),
}
stages = pytest.mark.parametrize("name", STAGES)
few = pytest.mark.parametrize("name", ["quest", "tidal", "recycled"])


def made(name, **options):
    cls, own = STAGES[name]
    return registry.stage(cls)(**{"min_len": 0, **own, **options})


def counts(stage, trace, row):
    return stage.budget([n for n, r in zip(trace.visual_tokens, trace.row, strict=True) if r == row])


@whole
@stages
def test_equals_a_literal_loop(family, name):
    """Rows of a batch, each against the stock model that reads alone what the loop chose; and what is read is
    counted."""
    model, stage, n = tiny.make(family), made(name), 8
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [stage]):
        out, trace = greedy(model, batch, n, **LOGITS), vtoken.trace(model)
    (entry,) = trace.stages
    assert entry.stood_aside is None and entry.rows_aside == [None, None, "the row has no image"]
    assert len(entry.slots_read) == n - 1
    for row in range(len(ROWS)):
        one = alone(model, batch, row)
        loop = literal(model, one, stage, counts(stage, trace, row))
        with reading(model, loop):
            want = greedy(model, one, n, **LOGITS)
        assert torch.equal(out.sequences[row, -n:], want.sequences[0, -n:])
        torch.testing.assert_close(
            torch.stack(out.logits)[:, row], torch.stack(want.logits)[:, 0], atol=2e-4, rtol=1e-4
        )
        assert [read[row] for read in entry.slots_read] == loop.read
    every = (trace.prompt_tokens[0] + 2) * len(loop.attending)
    assert entry.slots_read[1][0] < every or stage.name == "tidal", "tidal's later layers may keep a state"


@whole
@stages
def test_what_is_read_follows_from_a_formula(family, name):
    model, stage, n = tiny.make(family), made(name), 8
    batch = tiny.build(model, ROWS[:2], seed=3)
    with vtoken.wrapped(model, [stage]):
        greedy(model, batch, n)
        trace = vtoken.trace(model)
    attending = tiny.family(family).attending
    acting = [k for k in attending if k in stage.layers(4)]
    for row in range(2):
        images = [m for m, r in zip(trace.visual_tokens, trace.row, strict=True) if r == row]
        for step, read in enumerate(trace.stages[-1].slots_read):
            said = [stage.slots_read(k, acting, trace.prompt_tokens[row], images, step) for k in attending]
            if stage.name == "recycled" and stage.similarity is not None:
                assert None in said
            else:
                assert sum(said) == read[row]


@whole
@pytest.mark.parametrize("name", ["quest", "tidal", "recycled", "lserve"])
def test_a_full_budget_is_the_dense_model(family, name):
    """64 tokens and a second turn, bit for bit: nothing is chosen, so the model's own attention runs."""
    model, stage = tiny.make(family), made(name, keep="100%")
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, [[5], [5]], seed=9)

    def talk():
        a = greedy(model, first, 64, **LOGITS)
        both, _ = conversation(model, first, turn, a.sequences)
        return a, greedy(model, second(model, both, turn), 4, past_key_values=a.past_key_values, **LOGITS)

    want = talk()
    with vtoken.wrapped(model, [stage]):
        got = talk()
    for a, b in zip(want, got, strict=True):
        assert torch.equal(torch.stack(a.logits), torch.stack(b.logits))


@whole
@few
@pytest.mark.parametrize("more", [[[5], [5]], [[3, "img", 2], [3, "img", 2]]], ids=["text", "image"])
def test_second_turn(family, name, more):
    """What was chosen before stands for nothing after a turn; new pictures join the choice."""
    model, stage, n = tiny.make(family), made(name), 5
    first, turn = tiny.build(model, ROWS[:2], seed=3), tiny.build(model, more, seed=9)
    shown = tiny.family(family).pixels in turn
    if shown and mrope(model):
        pytest.importorskip("transformers", minversion="5.21", reason="older transformers numbers a new image as text")
    with vtoken.wrapped(model, [stage]):
        a, traces = greedy(model, first, n, **LOGITS), [vtoken.trace(model)]
        both, _ = conversation(model, first, turn, a.sequences)
        b = greedy(model, second(model, both, turn), n, past_key_values=a.past_key_values, **LOGITS)
        traces.append(vtoken.trace(model))
    assert len(traces[1].stages[-1].slots_read) == (n - 1 if shown else 2 * n - 2)
    for row in range(2):
        one, other = alone(model, first, row), alone(model, turn, row)
        loop = literal(model, one, stage, counts(stage, traces[0], row))
        with reading(model, loop):
            x = greedy(model, one, n, **LOGITS)
            whole, _ = conversation(model, one, other, x.sequences)
            if shown:
                loop.visual = visual_slots(model, whole)
                loop.budget += counts(stage, traces[1], row)
            y = greedy(model, second(model, whole, other), n, past_key_values=x.past_key_values, **LOGITS)
        for got, want in ((a, x), (b, y)):
            got, want = torch.stack(got.logits)[:, row], torch.stack(want.logits)[:, 0]
            torch.testing.assert_close(got, want, atol=3e-4, rtol=1e-4)
        assert [read[row] for read in traces[1].stages[-1].slots_read[-n + 1 :]] == loop.read[-n + 1 :]


@whole
@pytest.mark.parametrize("name", ["quest", "tidal once", "recycled"])
def test_behind_stages_that_drop_tokens(family, name):
    """Fewer slots, and layers that hold fewer than those before."""
    model, stage, n = tiny.make(family), made(name), 8
    drops = inside(family, [{"random": {"keep": 7}}, Deep(at=(2,), factor=0.6)])
    batch = tiny.build(model, ROWS, seed=3)
    prompts = [oracle.prompt(model, alone(model, batch, row)) for row in range(2)]
    with vtoken.wrapped(model, [*drops, stage]):
        out, trace = greedy(model, batch, n, **LOGITS), vtoken.trace(model)
    early, late = (found.kept for found in trace.stages[:2])
    assert sum(map(len, late)) < sum(map(len, early))
    for row, p in enumerate(prompts):
        one, mine = alone(model, batch, row), [i for i, r in enumerate(trace.row) if r == row]
        loop = literal(model, one, stage, stage.budget([len(early[i]) for i in mine]), [early[i] for i in mine], p)
        left = visual_slots(model, one, [late[i] for i in mine], p)
        loop.inner[trace.stages[1].layer] = left, stage.budget([len(late[i]) for i in mine])
        with reading(model, loop), vtoken.wrapped(model, drops):
            want = greedy(model, one, n, **LOGITS)
        got = torch.stack(out.logits)[:, row]
        torch.testing.assert_close(got, torch.stack(want.logits)[:, 0], atol=3e-4, rtol=1e-4)
        assert [read[row] for read in trace.stages[-1].slots_read] == loop.read


@whole
@stages
def test_batch_equals_single(family, name):
    model, stage = tiny.make(family), made(name)
    batch = tiny.build(model, ROWS, seed=3)
    with vtoken.wrapped(model, [{"random": {"keep": 9}}, stage]):
        together, read = greedy(model, batch, 9), vtoken.trace(model).stages[-1].slots_read
        for row in range(2):
            assert torch.equal(greedy(model, alone(model, batch, row), 9)[0, -9:], together[row, -9:])
            assert [[each[row]] for each in read] == vtoken.trace(model).stages[-1].slots_read


@whole
@stages
def test_beams(family, name):
    """What is kept for later tokens goes with its row: the score of every answer is that of saying it alone."""
    model, stage, n = tiny.make(family), made(name), 6
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    scored = {"output_scores": True, "return_dict_in_generate": True}
    with vtoken.wrapped(model, [stage]):
        out = greedy(model, batch, n, num_beams=3, num_return_sequences=2, length_penalty=0.0, **scored)
        assert vtoken.trace(model).stages[-1].stood_aside is None
        for sequence, found in zip(out.sequences, out.sequences_scores, strict=True):
            said = sequence[-n:].tolist()
            options = {
                "prefix_allowed_tokens_fn": lambda _, ids, said=said: [said[len(ids) - batch["input_ids"].shape[1]]]
            }
            logits = torch.stack(greedy(model, batch, n, **LOGITS, **options).logits)[:, 0].log_softmax(-1)
            want = logits.gather(1, sequence[-n:, None]).sum()
            torch.testing.assert_close(found, want, atol=1e-3, rtol=1e-3)


@attending
@few
def test_drafts(family, name):
    """Tokens that are verified together read everything, those that come alone what is chosen for them anew."""
    model, stage, n = tiny.make(family), made(name), 9
    batch = tiny.build(model, ROWS[:1], seed=5)
    batch.pop("attention_mask")
    row = alone(model, tiny.build(model, ROWS[:1], seed=5), 0)
    for drafts in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny.make(family)}):
        with vtoken.wrapped(model, [stage]):
            got = greedy(model, batch, n, **drafts)
            read = vtoken.trace(model).stages[-1].slots_read
        loop = literal(model, row, stage, 4 if name == "quest" else 3)
        with reading(model, loop):
            want = greedy(model, batch, n, **drafts)
        assert torch.equal(got, want) and [r[0] for r in read] == loop.read


@attending
@stages
def test_going_back(family, name):
    """Tokens that were generated are taken back, up to some of the picture's; what is said then is what is said
    without the way there."""
    model, stage = tiny.make(family), made(name)
    batch = tiny.build(model, [[3, "img", 1]], seed=5)
    begin = batch["input_ids"].shape[1]

    def say(cache, tokens):
        """Logits behind tokens that come one by one."""
        given = {"past_key_values": cache, "use_cache": True}
        return torch.cat([model(input_ids=torch.tensor([[t]]), **given).logits[:, -1] for t in tokens])

    with vtoken.wrapped(model, [stage]), torch.no_grad():
        cache = model(**batch, use_cache=True).past_key_values
        want = say(cache, [5, 6, 7, 8])
        cache.crop(-4)
        torch.testing.assert_close(say(cache, [5, 6, 7, 8]), want, atol=1e-5, rtol=1e-5)
        cache.crop(-7)  # the last word, and two visual tokens (a newline may be one of them)
        lost = cache.get_seq_length()
        assert lost == begin - 3 and say(cache, [5, 6]).isfinite().all()
        group = next(iter(cache.images.groups.values()))
        assert max(group.visual.flatten().tolist()) < lost and group.end == lost
