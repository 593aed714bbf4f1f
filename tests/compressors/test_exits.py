"""Exits inside models: every row leaves at the layer that the stock model's own hidden states and attention maps say, never at another."""

from __future__ import annotations

import gates
import pytest
import tiny
import torch
from batches import rows_for
from known_exits import leaves, load
from modes import attending, families, greedy
from watchers import dense, where

import vtoken
from vtoken import config, registry
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.evals import reference
from vtoken.evals.cost.flops import account

DEPTH = 4


def asked_text(model, batch):
    """Row -> columns of its images, and of the text behind the last of them."""
    found = {}
    for row, columns, _, later in where(model, batch):
        before = found[row][0] if row in found else columns[:0]
        found[row] = torch.cat([before, columns]), later
    return found


def first_layer(says):
    return next((k for k in range(1, DEPTH) if says(k)), DEPTH)


def held_against(trace, exits):
    """`exits`: row -> the first layer without its images."""
    for k, counts in enumerate(trace.layers):
        want = [0 if k >= exits[row] else n for row, n in zip(trace.row, trace.visual_tokens, strict=True)]
        assert counts == want, f"layer {k}"


@families
def test_gates_decide_on_what_the_stock_model_computes(family):
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    hidden, texts = dense(model, batch).hidden, asked_text(model, batch)
    told = []
    for seed in range(18, 24):
        weights = load(gates.file(seed=seed))
        exits = {
            row: first_layer(lambda k, row=row, later=later, w=weights: leaves(w, k, hidden[k][row, later]))
            for row, (_, later) in texts.items()
        }
        with vtoken.wrapped(model, [{"dyvte": {"gates": gates.file(seed=seed)}}]), torch.no_grad():
            model(**batch)
            held_against(vtoken.trace(model), exits)
        told.append(len(set(exits.values())))
    assert max(told) > 1, "rows leave at different layers"


@attending
@pytest.mark.parametrize("name, window", [("todre_exit", None), ("attention_exit", 1), ("attention_exit", 3)])
def test_attention_decides_as_the_stock_models_maps_say(family, name, window):
    """Thresholds between the two rows' masses, so that one row leaves at that layer."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    maps, texts = dense(model, batch).attentions, asked_text(model, batch)
    mass = {
        row: [
            maps[k - 1][row][:, later[-(window or 99) :]][..., columns].sum(-1).mean().item() for k in range(1, DEPTH)
        ]
        for row, (columns, later) in texts.items()
    }
    options = {"at": (1, 2, 3)} if name == "todre_exit" else {"first": 1, "window": window}
    for threshold in {(a + b) / 2 for a, b in zip(*mass.values(), strict=True)}:
        exits = {row: first_layer(lambda k, m=m, t=threshold: m[k - 1] < t) for row, m in mass.items()}
        with vtoken.wrapped(model, [{name: {"threshold": threshold, **options}}]), torch.no_grad():
            model(**batch)
            held_against(vtoken.trace(model), exits)


EXITS = [
    {"dyvte": {"gates": gates.file(seed=18)}},
    {"todre_exit": {"threshold": 1.0, "at": (1, 2, 3)}},
    {"attention_exit": {"threshold": 1.0, "first": 1}},
]


@pytest.mark.parametrize("stage", EXITS, ids=lambda s: next(iter(s)))
def test_a_prompt_that_ends_with_its_image_keeps_it(stage):
    model = tiny.make("llava")
    with vtoken.wrapped(model, [stage]):
        greedy(model, tiny.build(model, [[3, "img", 6], [2, "img", 3, "img"]], seed=3))
        assert vtoken.trace(model).tokens_out == [0, 16, 16]


@pytest.mark.parametrize("stage", EXITS, ids=lambda s: next(iter(s)))
def test_a_prompt_without_an_image(stage):
    model = tiny.make("llava")
    batch = tiny.build(model, [[5]], seed=3)
    want = greedy(model, batch)
    with vtoken.wrapped(model, [stage]):
        assert torch.equal(greedy(model, batch), want)


def test_gates_of_another_model_are_refused():
    model = tiny.make("llava")
    for wrong in (gates.file(seed=1, depth=3), gates.file(seed=1, width=8), "tiny-llava"):
        with pytest.raises(OtherModelError, match=r"dyvte.*are for a decoder of .* train-exit"):
            vtoken.wrap(model, [{"dyvte": {"gates": wrong}}])
        with pytest.raises(UnsupportedError, match="are for a decoder of"):
            account(model.config, config.load([{"dyvte": {"gates": wrong}}]))
    vtoken.wrap(model, [{"dyvte": {"gates": gates.file(seed=1)}}])


def test_files_that_hold_no_gates_are_refused_when_the_pipeline_is_read(tmp_path):
    weights = str(reference.path() / "model.safetensors")
    for wrong, message in ((weights, "holds no gates"), (str(tmp_path / "x"), "no file"), (__file__, "no safetensors")):
        with pytest.raises(ConfigError, match=f"gates.*{message}"):
            config.load([{"dyvte": {"gates": wrong}}])
    with pytest.raises(ConfigError, match="'gates' is missing"):
        config.load("dyvte")


def test_the_account_takes_the_measured_shares():
    model = tiny.make("llava")
    stage = {"dyvte": {"gates": gates.file(stay=(1.0, 0.5, 0.5, 0.25))}}
    plan = account(model.config, config.load([stage]), text_tokens=8)
    assert plan.visual_tokens == (16, 8, 8, 4) and plan.stages == 3 * 2 * 5 * (2 * 32 + 2)


def test_the_shipped_gates_are_the_shipped_models():
    model, processor = reference.load()
    asked = reference.questions(6)
    with vtoken.wrapped(model, "dyvte-tiny-llava"):
        reference.answers(model, processor, asked)
        seen = vtoken.trace(model)
    assert seen.layers[0] == [576] * 6 and {n for layer in seen.layers for n in layer} == {0, 576}
    (stage,) = config.load("dyvte-tiny-llava").stages
    told = registry.stage("dyvte")(gates="tiny-llava")
    assert stage == told and not told.incompatibility(len(seen.layers), model.config.text_config.hidden_size)
