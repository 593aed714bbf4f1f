"""`min_visual_tokens`: rows with fewer visual tokens run dense, whatever the stages and whoever shares the batch."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
import yaml
from batches import inside, rows_for, uneven
from flop_counts import Pipe
from modes import LOGITS, alone, families, greedy, skip_refused
from probes import Deep, Inside, InsideMerge, Ragged
from sparse_probes import Ladder

import vtoken
from vtoken import config
from vtoken.config.schema import schema as pipeline_schema
from vtoken.errors import ConfigError

STAGES = {
    "tokens": [{"fastervlm": {"keep": 5}}, Ragged()],
    "merged": [{"pool": {"size": 2}}],
    "decoder": [Deep(at=(1,), factor=0.7), {"fastv": {"keep": 2, "layer": 2}}],
    "attention": [Ladder()],
    "cache": [{"snapkv": {"keep": 2, "window": 2}}],
    "unmerged": [{"pool": {"size": 2}}, "vtu"],
    "inside": [Inside(at=(1,), uniform=True)],
    "merged inside": [InsideMerge(at=(1,)), Ragged()],
    "all": [
        Inside(at=(1,)),
        {"fastervlm": {"keep": 9}},
        {"fastv": {"keep": 5, "layer": 2}},
        Ladder(),
        {"snapkv": {"keep": 2}},
    ],
}
pipelines = pytest.mark.parametrize("name", STAGES)


@families
@pipelines
def test_prompts_with_few_visual_tokens_run_dense_to_the_bit(family, name):
    model = tiny.make(family)
    skip_refused(model, inside(family, STAGES[name]))
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    want = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, {"min_visual_tokens": 1000, "stages": inside(family, STAGES[name])}):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert type(got.past_key_values) is type(want.past_key_values), "the cache is left alone"
    most = max(sum(n for n, r in zip(trace.visual_tokens, trace.row, strict=True) if r == row) for row in range(3))
    reason = f"{most} visual tokens are fewer than min_visual_tokens 1000"
    own = [s for s in trace.stages if s.name != "vtu"]
    assert own and all(s.stood_aside == reason and s.tokens_in == s.tokens_out for s in own)
    assert trace.dense_rows == [0, 1, 2] and trace.layers == [trace.visual_tokens] * 4
    assert all(s.stood_aside for s in trace.stages)
    assert json.loads(json.dumps(trace.to_dict()))["dense_rows"] == [0, 1, 2]


@families
@pipelines
def test_a_ragged_batch_decides_row_by_row(family, name):
    """Row 0 holds too few, row 1 enough: the one equals the dense model, the other the pipeline without a threshold."""
    model, stages = tiny.make(family), inside(family, STAGES[name])
    skip_refused(model, stages)
    batch = tiny.build(model, uneven(family), seed=3)
    dense = greedy(model, batch, **LOGITS)
    with vtoken.wrapped(model, stages):
        plain = greedy(model, alone(model, batch, 1), **LOGITS)
        single = vtoken.trace(model)
    with vtoken.wrapped(model, {"min_visual_tokens": sum(single.visual_tokens), "stages": stages}):
        got, trace = greedy(model, batch, **LOGITS), vtoken.trace(model)
    assert trace.dense_rows == [0, 2]
    logits = torch.stack(got.logits)
    for row, want in ((0, torch.stack(dense.logits)[:, 0]), (1, torch.stack(plain.logits)[:, 0])):
        torch.testing.assert_close(logits[:, row], want, atol=2e-4, rtol=1e-4)
    assert trace.kept[0].tolist() == list(range(trace.visual_tokens[0]))
    assert [k.tolist() for k in trace.kept[1:]] == [k.tolist() for k in single.kept]
    assert [layer[1:] for layer in trace.layers] == single.layers
    for mine, other in zip(trace.stages, single.stages, strict=True):
        assert mine.tokens_out[1:] == other.tokens_out and mine.stood_aside is None
    if trace.cached:
        text = trace.prompt_tokens[0]
        assert [held[0] for held in trace.cached] == [text] * len(tiny.family(family).attending) and trace.cached[0][
            1
        ] == single.cached[0][0]
    assert not torch.allclose(logits[:, 1], torch.stack(dense.logits)[:, 1], atol=1e-3), "the stages do something"


@pytest.mark.parametrize("family", tiny.families(anyres=True))
@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("newline", ["keep", "drop"])
def test_policies_do_not_touch_them_either(family, positions, newline):
    model = tiny.make(family)
    batch = tiny.build(model, uneven(family)[:2], seed=3)
    dense = torch.stack(greedy(model, batch, **LOGITS).logits)
    pipeline = {"positions": positions, "newline": newline, "stages": [{"fastervlm": {"keep": 5}}, Deep()]}
    with vtoken.wrapped(model, pipeline):
        plain = greedy(model, alone(model, batch, 1), **LOGITS)
        least = sum(vtoken.trace(model).visual_tokens)
    with vtoken.wrapped(model, {**pipeline, "min_visual_tokens": least}):
        got = torch.stack(greedy(model, batch, **LOGITS).logits)
    torch.testing.assert_close(got[:, 0], dense[:, 0], atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(got[:, 1], torch.stack(plain.logits)[:, 0], atol=2e-4, rtol=1e-4)
    with vtoken.wrapped(model, {**pipeline, "min_visual_tokens": least + 1}):
        assert torch.equal(torch.stack(greedy(model, batch, **LOGITS).logits), dense)


def test_a_dense_turn_behind_a_pruned_one():
    """A turn with a small picture on the cache of a pruned prompt adds all its tokens."""
    model = tiny.make("llava")
    first, more = tiny.build(model, [[3, "img", 1, "img", 9]], seed=3), tiny.build(model, [[2, "img", 3]], seed=4)
    for stages in (STAGES["all"][:2], STAGES["cache"]):
        with vtoken.wrapped(model, {"min_visual_tokens": 32, "stages": stages}), torch.no_grad():
            out = model(**first, use_cache=True)
            total = first["input_ids"].shape[1] + more["input_ids"].shape[1]
            second = {**more, "attention_mask": torch.ones(1, total, dtype=torch.long)}
            held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
            again = model(**second, past_key_values=out.past_key_values)
            trace = vtoken.trace(model)
        assert trace.dense_rows == [0] and trace.layers == [[16]] * 4
        assert all(s.stood_aside for s in trace.stages)
        assert [layer.keys.shape[2] for layer in again.past_key_values.layers] == [n + 21 for n in held]
        assert again.logits.shape[1] == 21 and bool(again.logits[:, -1].isfinite().all())


@pytest.mark.parametrize("value", [-1, 1.5, True, "64", None])
def test_bad_thresholds_are_named(value):
    with pytest.raises(ConfigError, match="min_visual_tokens must be a whole number >= 0, not"):
        config.load({"min_visual_tokens": value, "stages": ["pool"]})


def test_the_key_is_read_written_and_described(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("min_visual_tokens: 160\nstages: [pool]\n")
    pipeline = config.load(file)
    assert pipeline.min_visual_tokens == 160
    assert config.load(yaml.safe_load(config.dump(pipeline))).min_visual_tokens == 160
    assert config.load("pool").min_visual_tokens == 0
    entry = pipeline_schema()["properties"]["min_visual_tokens"]
    assert (entry["type"], entry["minimum"], entry["default"]) == ("integer", 0, 0) and entry["description"]


def test_the_account_knows_it():
    from vtoken.evals.cost.flops import account

    model = tiny.llava()
    stages = config.load([{"uniform": {"keep": 4}}]).stages
    whole = account(model.config)
    for least, want in ((16, 4), (17, 16)):
        found = account(model.config, Pipe(stages, min_visual_tokens=least))
        assert found.visual_tokens == (want,) * 4
        assert (found.prefill_linear == whole.prefill_linear) == (want == 16)
        assert any("16 visual tokens are fewer than min_visual_tokens 17" in s for s in found.left_out) == (want == 16)
