"""What every stage that is discovered must keep to, on packed tokens and inside a model."""

from __future__ import annotations

import pytest
import tiny
import torch
import usual
from batches import behind, inside
from model_state import changed, state
from modes import ROWS, families
from plain_runs import BATCHES, run
from probes import Deep, Failing, Inside, Ragged
from usual import stage

import vtoken
from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.stages import Fact, VisualTokens, spec_of

WIDTH = tiny.TEXT["hidden_size"]
LENGTHS, PARTS = (16, 9, 1, 30), (((1, 4, 4),), ((1, 3, 3),), ((1, 1, 1),), ((1, 2, 3), (1, 4, 6)))


def packed(stage, lengths=LENGTHS, parts=PARTS, seed=0):
    """Random tokens and facts, the same for an image wherever it stands in the batch."""
    xs, facts = [], {f: [] for f in stage.needs()}
    specs = {f: spec_of(f.name, stage.site) for f in facts}
    for n in lengths:
        g = torch.Generator().manual_seed(seed + n)
        xs.append(torch.randn(n, WIDTH, generator=g))
        for f, values in facts.items():
            one = specs[f].holds == "one"
            values.append(torch.rand(n, generator=g) if one else torch.randn(n, WIDTH, generator=g))
    raster_index = torch.cat([torch.arange(n) for n in lengths])
    layer = min(stage.layers(4)) if stage.site == "decoder" else None
    # Text is one tensor per row, what stands behind an image one per image.
    found = {f: torch.cat(v) if specs[f].per == "token" else v for f, v in facts.items()}
    return VisualTokens.pack(
        torch.cat(xs), lengths, parts, tuple(range(len(lengths))), raster_index, facts=found, layer=layer
    )


# Stages of site cache decide layer by layer on keys and values: test_cache_stages.py and test_kvpress.py hold them.
# LLaVA has no frames, and pictures of one size: test_frames.py, test_pixels.py.
every = pytest.mark.parametrize(
    "name", [name for name in usual.ALONE if registry.stage(name).site not in ("cache", "frames", "pixels")]
)
# The others decide about attention, not about tokens.
DECIDING = [
    name
    for name in registry.stages()
    if registry.stage(name).site in ("pixels", "frames", "encoder", "tokens", "decoder")
]
deciding = pytest.mark.parametrize("name", DECIDING)


@deciding
def test_decision_is_well_formed(name):
    s = stage(name)
    tokens = packed(s)
    keep = s.select(tokens)
    assert keep.lengths == s.expected_counts(LENGTHS, PARTS, tokens.row, tokens.layer), (
        "plan() tells what select() leaves"
    )
    assert len(keep.index) == sum(keep.lengths)
    assert torch.equal(keep.index, keep.index.unique()), "ascending and unique"
    start = 0
    for i, part in enumerate(keep.index.split(keep.lengths)):
        assert bool(((part >= start) & (part < start + LENGTHS[i])).all()), "within its own image"
        start += LENGTHS[i]
    if keep.into is not None:
        assert torch.equal(keep.into[keep.index], torch.arange(len(keep.index))), "a kept token absorbs itself"
    again = s.select(packed(s))
    assert torch.equal(keep.index, again.index)


@deciding
def test_decision_does_not_depend_on_the_batch(name):
    s = stage(name)
    whole = s.select(packed(s))
    start = 0
    for i, part in enumerate(whole.index.split(whole.lengths)):
        alone = s.select(packed(s, LENGTHS[i : i + 1], PARTS[i : i + 1]))
        assert torch.equal(alone.index + start, part)
        start += LENGTHS[i]


@every
def test_facts_are_known(name):
    assert all(isinstance(f, Fact) and spec_of(f.name, stage(name).site) for f in stage(name).needs())


@every
def test_batch_in_a_model_equals_single(name):
    model = tiny.llava()
    rows = [["img", 3], [1, "img", 2, "img", 7], [4]]
    batch = tiny.build(model, rows, seed=3)
    with vtoken.wrapped(model, [stage(name)]):
        out, trace = run(model, batch), vtoken.trace(model)
        one = {k: v[:1] for k, v in batch.items()}
        one = {
            "input_ids": one["input_ids"][:, -19:],
            "attention_mask": one["attention_mask"][:, -19:],
            "pixel_values": one["pixel_values"],
        }
        alone, single = run(model, one), vtoken.trace(model)
    assert torch.equal(out.sequences[0, -8:], alone.sequences[0, -8:])
    assert torch.equal(trace.kept[0], single.kept[0])
    assert trace.row == [0, 1, 1] and trace.visual_tokens == [16, 16, 16]
    assert {s.name for s in trace.stages} == {name}
    assert trace.stages[-1].tokens_out == trace.tokens_out == trace.layers[-1]


IDENTITY = [
    "none",
    [{"fastervlm": {"keep": "100%"}}],
    [{"uniform": {"keep": 99}}],
    [{"pool": {"size": 1}}],
    [Deep(factor=-1.0)],
]


@pytest.mark.parametrize("pipeline", IDENTITY, ids=str)
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_keeping_everything_is_the_identity(pipeline, positions):
    model = tiny.llava()
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    want = run(model, batch)
    stages = [] if pipeline == "none" else pipeline
    with vtoken.wrapped(model, {"positions": positions, "stages": stages}):
        got = run(model, batch)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits)), "bit for bit"


@families
@pytest.mark.parametrize("pipeline", ["none", {"positions": "original", "newline": "drop", "stages": []}], ids=str)
def test_a_pipeline_without_stages_installs_nothing(family, pipeline):
    """Nothing but the note that the model is wrapped."""
    model = tiny.make(family)
    before = state(model)
    vtoken.wrap(model, pipeline)
    assert changed(before, state(model)) == {("", "_vtoken_session")}
    with pytest.raises(UnsupportedError, match="has no stages"):
        vtoken.trace(model)
    vtoken.unwrap(model)
    assert state(model) == before


@families
@pytest.mark.parametrize(
    "stages", [["fastervlm:3"], [Ragged(), Deep()], [Inside(at=(1,)), Ragged(), Deep(at=(1, 2))]], ids=str
)
def test_unwrap_is_exact(family, stages):
    model, stages = tiny.make(family), inside(family, stages)
    batch = tiny.build(model, ROWS, seed=3)
    # transformers puts hooks of its own on the tower at its first run.
    want, config = run(model, batch), model.config.to_json_string()
    before = state(model)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for _ in range(2):
        vtoken.wrap(model, stages if not isinstance(stages[0], str) else stages[0])
        assert state(model) != before
        assert model.state_dict().keys() == weights.keys() and model.config.to_json_string() == config
        run(model, batch)
        vtoken.unwrap(model)
        assert changed(before, state(model)) <= {("model", "rope_deltas")}
    got = run(model, batch)
    assert torch.equal(torch.stack(got.logits), torch.stack(want.logits))
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@families
@pytest.mark.parametrize("site", ["encoder", "tokens", "decoder"])
def test_an_exception_leaves_the_model_usable(family, site):
    """The first prefill fails inside the stage; the next one, and the unwrapped model, are as if nothing had
    happened."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    want = run(model, batch)
    failing = {"encoder": Inside, "tokens": Failing, "decoder": Deep}[site]
    fail = True

    class Sometimes(failing):
        def select(self, tokens):
            if fail:
                raise ZeroDivisionError("a bug in a stage")
            return Ragged().select(tokens)

    stage = Sometimes(keep=3) if site == "tokens" else Sometimes(at=behind(family, 1))
    with vtoken.wrapped(model, [stage]):
        with pytest.raises(ZeroDivisionError):
            run(model, batch)
        text = tiny.build(model, [[5]], seed=1)
        assert run(model, text).sequences.shape == (1, 13)
        fail = False
        first = run(model, batch)
        assert torch.equal(run(model, batch).sequences, first.sequences)
    with vtoken.wrapped(model, [type("Fresh", (type(stage),), {})(**stage.model_dump())]):
        assert torch.equal(run(model, batch).sequences, first.sequences)
    assert torch.equal(torch.stack(run(model, batch).logits), torch.stack(want.logits))


@families
@pytest.mark.parametrize("stages", [[Failing(keep=3)], [Deep()]], ids=str)
def test_an_exception_does_not_reach_into_other_conversations(family, stages):
    """A prefill dies inside the decoder; a decode step on an older cache must not see what it left behind."""
    model = tiny.make(family)
    text = tiny.build(model, [[5]], seed=1)
    want = model.generate(**text, max_new_tokens=4, do_sample=False)
    with vtoken.wrapped(model, stages), torch.no_grad():
        out = model(**text)
        handle = model.get_decoder().layers[3].register_forward_pre_hook(lambda m, a: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**tiny.build(model, ROWS[:1], seed=3))
        handle.remove()
        if tiny.family(family).mrope:
            model.model.rope_deltas = None  # upstream keeps the failed prompt's: one model, one conversation at a time
        token = out.logits[:, -1:].argmax(-1)
        second = model(token, past_key_values=out.past_key_values).logits[:, -1:].argmax(-1)
    assert [token.item(), second.item()] == want[0, 5:7].tolist()


def test_a_bad_decision_is_named():
    class Bad(Ragged):
        def select(self, tokens):
            keep = super().select(tokens)
            return type(keep)(keep.index[:-1], keep.lengths)

    model = tiny.llava()
    with vtoken.wrapped(model, [Bad()]), pytest.raises(ValueError, match="returned a Keep"):
        run(model, tiny.build(model, BATCHES["one"], seed=3))


def test_wrap_says_what_is_wrong(tmp_path):
    model = tiny.llava()
    vtoken.wrap(model, "fastervlm:3")
    with pytest.raises(UnsupportedError, match="already"):
        vtoken.wrap(model, "none")
    with pytest.raises(UnsupportedError, match="not run yet"):
        vtoken.trace(model)
    vtoken.unwrap(model)
    with pytest.raises(UnsupportedError, match="not wrapped"):
        vtoken.unwrap(model)
    with pytest.raises(UnsupportedError, match="not wrapped"):
        vtoken.trace(model)
    with pytest.raises(UnsupportedError, match="Hugging Face"):
        vtoken.wrap(torch.nn.Linear(2, 2), "none")
    with pytest.raises(UnsupportedError, match="Hugging Face"):
        vtoken.wrap("llava-hf/llava-1.5-7b-hf", "none")


@families
def test_parts_of_a_vlm_are_told_from_the_whole(family):
    model = tiny.make(family)
    outer = model.model
    for part in (outer, model.get_decoder(), registry.adapter(family)(model).tower, model.lm_head):
        with pytest.raises(UnsupportedError, match="whole VLM") as error:
            vtoken.wrap(part, "none")
        assert type(part).__name__ in str(error.value)
    vtoken.unwrap(vtoken.wrap(model, "none"))


def test_a_vlm_of_another_family_is_no_part(monkeypatch):
    model = tiny.llava()
    monkeypatch.setattr(type(model.config), "model_type", "lava")
    with pytest.raises(UnsupportedError, match="unknown model_type 'lava', did you mean 'llava'"):
        vtoken.wrap(model, "none")


def pixtral():
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision = {"model_type": "pixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    vision |= {"num_attention_heads": 4, "head_dim": 8, "image_size": 56, "patch_size": 14}
    text = {"model_type": "llama", **tiny.TEXT}
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=tiny.IMG)
    )


@pytest.mark.parametrize(
    "build, message",
    [
        (pixtral, "pixtral"),
        (lambda: tiny.llava(attn="eager", text="gemma2", head_dim=8), "caps the logits"),
        (lambda: tiny.llava(attn="eager", text="gpt_oss", head_dim=8), "has sinks in its attention"),
    ],
)
def test_unsupported_models(build, message):
    with pytest.raises(UnsupportedError, match=message):
        vtoken.wrap(build(), "fastervlm:3")


def test_layers_without_rotary_embeddings_are_not_turned_ahead():
    model = tiny.llava(text="smollm3", no_rope_layers=[1, 0, 1, 1])
    with vtoken.wrapped(model, [{"pyramiddrop": {"keep": 4, "at": [2]}}]):
        pass
    with pytest.raises(UnsupportedError, match="next_query_attention cannot be computed for SmolLM3Attention"):
        vtoken.wrap(model, [{"pyramiddrop": {"keep": 4, "at": [1]}}])


def test_saving_a_wrapped_model(tmp_path):
    from transformers import LlavaForConditionalGeneration

    model = tiny.llava()
    with vtoken.wrapped(model, "fastervlm:3"):
        model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in model.state_dict().items())


def test_trace_is_plain_data():
    import json

    model = tiny.llava()
    batch = tiny.build(model, BATCHES["ragged"], seed=3)
    with vtoken.wrapped(model, [{"fastervlm": {"keep": 5}}, {"pool": {"size": 2}}]):
        out = run(model, batch)
        data = json.loads(json.dumps(vtoken.trace(model).to_dict()))
    assert [s["name"] for s in data["stages"]] == ["fastervlm", "pool"]
    assert data["stages"][1]["tokens_in"] == data["stages"][0]["tokens_out"] == [5, 5, 5]
    keys = out.past_key_values.layers[0].keys
    per_token = 2 * 4 * keys.shape[0] * keys.shape[1] * keys.shape[3] * keys.element_size()
    assert data["cache_bytes"] == per_token * max(data["prompt_tokens"])
    for kept, into in zip(data["stages"][1]["kept"], data["stages"][1]["into"], strict=True):
        assert set(into) == {-1, *kept}


def test_facts_of_layers_that_do_not_exist_are_refused():
    with pytest.raises(UnsupportedError, match="layer 30; there are 4"):
        vtoken.wrap(tiny.llava(), [{"vscan": {"keep": 5, "local_layer": 30}}])


@families
def test_facts_of_a_layer_of_the_tower_that_runs_later_are_refused(family):
    class Ahead(Inside):
        def needs(self):
            return (Fact("keys", -1),)

    with pytest.raises(UnsupportedError, match="after encoder layer 1 and needs keys of layer 3, which runs later"):
        vtoken.wrap(tiny.make(family), [Ahead(at=(1,))])


def test_a_fact_that_a_family_lacks_is_refused_with_its_reason():
    from vtoken import config
    from vtoken.compatibility import check

    adapter = registry.adapter("llava")(tiny.llava())
    adapter.missing = {"cls_attention": "this tower looks at nothing; nearest: keys"}
    with pytest.raises(UnsupportedError, match="fastervlm needs cls_attention: this tower looks at nothing"):
        check(adapter, config.load("fastervlm:4"))
