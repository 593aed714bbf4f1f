"""`model.forward = torch.compile(model.forward)` with a cache that grows, and what stands in the model while a pipeline
is on."""

from __future__ import annotations

import modes
import pytest
import tiny
import torch
from modes import ROWS, greedy, whole
from probes import Deep, Inside, Ragged
from usual import stage

import vtoken
from vtoken.compressors.cache.zipvl_cache import ZipVLCache

PIPELINES = {
    "fastv": [{"fastv": {"keep": 3, "layer": 2}}],
    "snapkv": [{"snapkv": {"keep": 2, "window": 2}}],
    "quest": [{"quest": {"keep": 4, "size": 2, "min_len": 0}}],
    "few bits": [ZipVLCache(tau=0.9, recent=2, drawn=4, mode="quantise")],
}


# Compiling takes seconds; families differ in nothing that is compiled here but DeepStack and axes of positions.
CASES = sorted(
    {("llava", name) for name in PIPELINES} | {(family, "fastv") for family in tiny.each("deepstack", window=None)}
)


@pytest.mark.parametrize(("family", "name"), CASES)
def test_a_compiled_forward_on_a_growing_cache(family, name):
    """A decode step, rows of different lengths: the answer of the step that is not compiled."""
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 1), value=1)
    step = {"input_ids": torch.full((len(ROWS), 1), 7), "attention_mask": mask, "use_cache": True}
    if modes.mrope(model):
        step["position_ids"] = torch.full((3, len(ROWS), 1), 40)
    torch._dynamo.reset()
    with vtoken.wrapped(model, PIPELINES[name]), torch.no_grad():
        want, got = (
            forward(**step, past_key_values=model(**batch, use_cache=True).past_key_values).logits
            for forward in (model.forward, torch.compile(model.forward, backend="eager"))
        )
    torch._dynamo.reset()
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@whole
@pytest.mark.parametrize(
    "stages",
    [
        [Inside(at=(1,)), Ragged()],
        [Deep()],
        [stage("fastv", seed=1)],
        [{"snapkv": {"keep": 2, "window": 2}}],
        [{"flexprefill": {"min_len": 0}}],
    ],
    ids=["tokens", "decoder", "fastv", "cache", "attention"],
)
def test_what_users_set_is_what_they_read(family, stages):
    """The attention of every layer goes by its own name, before, between and after calls, and after one that failed."""
    model = tiny.make(family)
    attentions = [module for module in model.modules() if hasattr(module, "config") and hasattr(module, "layer_idx")]

    def read():
        return [(id(module.config), module.config._attn_implementation) for module in attentions]

    want = read()
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    vtoken.wrap(model, stages)
    assert len(want) >= len(tiny.family(family).attending) and read() == want
    greedy(model, batch, 2)
    assert read() == want
    failing = model.lm_head.register_forward_pre_hook(lambda *a: 1 / 0)
    layer = model.get_decoder().layers[-1]
    last = getattr(layer, "mlp" if hasattr(layer, "mlp") else "feed_forward").register_forward_pre_hook(
        lambda *a: 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        greedy(model, batch, 2)
    assert read() == want
    failing.remove()
    last.remove()
    greedy(model, batch, 2)
    vtoken.unwrap(model)
    assert read() == want
