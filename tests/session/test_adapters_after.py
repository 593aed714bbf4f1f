"""LoRA, quantisation and torch.compile in every order with `wrap`: the same results."""

from __future__ import annotations

import pytest
import tiny
import torch
from lora import lora, outcome, peft, same
from modes import families, greedy
from probes import Deep

import vtoken
from vtoken.errors import UnsupportedError

ROWS = [[3, "img", 5], [1, "img", 4]]
# Every fact that the tower's projections give, by a stage that reads it.
READERS = ["fastervlm", "fopru", "flowcut", "prumerge", "visionzip", "vispruner", "vflowopt", "holov"]


@families
@pytest.mark.parametrize("name", READERS)
def test_the_order_of_wrap_and_lora_does_not_matter(family, name):
    pipeline = [{name: {"keep": 5}}, {"fastv": {"keep": 3, "layer": 2}}]
    first = lora(tiny.make(family))
    batch = tiny.build(tiny.make(family), ROWS, seed=3)
    vtoken.wrap(first, pipeline)
    want = outcome(first, batch)
    second = lora(vtoken.wrap(tiny.make(family), pipeline))
    same(outcome(second, batch), want)
    with second.disable_adapter(), first.disable_adapter():
        off = outcome(second, batch)
        same(outcome(first, batch), off)
    with vtoken.wrapped(tiny.make(family), pipeline) as plain:
        same(outcome(plain, batch), off)
    assert not torch.allclose(off[0], want[0], atol=1e-2), "the adapter does something"
    same(outcome(second, batch), want)
    bare = second.unload()
    same(outcome(bare, batch), off)
    vtoken.unwrap(bare)
    assert not any("_seen" in repr(hook) for m in bare.modules() for hook in m._forward_hooks.values())


@families
def test_either_object_is_taken(family):
    model = tiny.make(family)
    adapted = lora(model)
    batch = tiny.build(model, ROWS, seed=3)
    assert vtoken.wrap(adapted, [Deep()]) is adapted
    with pytest.raises(UnsupportedError, match="already"):
        vtoken.wrap(model, "none")
    greedy(adapted, batch, 1)
    assert vtoken.trace(model) is vtoken.trace(adapted)
    assert vtoken.unwrap(model) is model
    with vtoken.wrapped(adapted, [Deep()]) as given:
        assert given is adapted


def test_a_compiled_model_is_taken():
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    compiled = torch.compile(model, backend="eager")
    with vtoken.wrapped(compiled, [Deep()]), torch.no_grad():
        got = compiled(**batch).logits
        assert vtoken.trace(model).visual_tokens and vtoken.trace(compiled).visual_tokens
        torch.testing.assert_close(got, model(**batch).logits)


@families
def test_saved_copies_of_modules_are_refused_with_the_reason(family):
    """peft copies modules that it trains whole; what watches a model cannot be copied."""
    model = vtoken.wrap(tiny.make(family), [{"fastervlm": {"keep": 5}}])
    projector = tiny.adapter(model).projectors[0]
    name = next(name for name, module in model.named_modules() if module is projector)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=[name.split(".")[-1]])
    with pytest.raises(TypeError, match="unwrap"):
        peft.get_peft_model(model, settings)


@families
@pytest.mark.parametrize("before", [True, False], ids=["quantise, wrap", "wrap, quantise"])
def test_dynamic_quantisation(family, before):
    pipeline = [{"fastervlm": {"keep": 5}}, {"fastv": {"keep": 3, "layer": 2}}]
    batch = tiny.build(tiny.make(family), ROWS, seed=3)

    def quantise(model):
        # Where the stock tower reads the dtype of its stem's weight, which then is none, the stem is left as it is.
        stem = tiny.family(family).reads_stem
        for part in (model.get_decoder(), *tiny.adapter(model).encoder.layers) if stem else (model,):
            torch.ao.quantization.quantize_dynamic(part, {torch.nn.Linear}, inplace=True)
        return model

    with vtoken.wrapped(quantise(tiny.make(family)), pipeline) as first:
        want = outcome(first, batch)
    model = tiny.make(family)
    vtoken.wrap(quantise(model) if before else model, pipeline)
    if not before:
        quantise(model)
    same(outcome(model, batch), want)
    vtoken.unwrap(model)
    assert not any(m._forward_hooks for m in model.modules() if "Linear" in type(m).__name__)
