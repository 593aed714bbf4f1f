"""A tower that overflows: what it makes of a token is the model's affair, and no reason to drop it."""

from __future__ import annotations

import pytest
import tiny
import torch
from batches import rows_for
from modes import families
from probes import Inside, InsideMerge

import vtoken
from vtoken import registry

STAGES = {
    "inside": [Inside(at=(1,))],
    "merged": [InsideMerge(at=(1,))],
    "then tokens": [Inside(at=(1,)), {"uniform": {"keep": 3}}],
    "frames": [{"frames_uniform": {"keep": 1}}],
    "tokens": [{"uniform": {"keep": 3}}],
}


@families
@pytest.mark.parametrize("name", STAGES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_overflows_is_not_dropped(family, name, value):
    """Some features are NaN from the projector on: the same tokens stay, and the decoder gets as many as the trace
    says."""
    if name == "frames" and family not in tiny.VIDEO:
        pytest.skip("takes no video")
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "video and image" if name == "frames" else "ragged"), seed=3)
    entered = []
    model.get_decoder().layers[0].register_forward_pre_hook(
        lambda m, args: entered.append(args[0].shape[1]),
    )
    projector, found = registry.adapter(family)(model).projectors[0], []

    def overflow(module, args, out):
        out = out.clone()
        out.flatten(0, -2)[::2] = value
        return out

    for poisoned in (False, True):
        hook = projector.register_forward_hook(overflow) if poisoned else None
        with vtoken.wrapped(model, STAGES[name]), torch.no_grad():
            model(**batch)
            trace = vtoken.trace(model)
        assert entered[-1] == max(trace.prompt_tokens)
        text = [
            n - sum(k for k, r in zip(trace.layers[0], trace.row, strict=True) if r == row)
            for row, n in enumerate(trace.prompt_tokens)
        ]
        found.append((trace.tokens_out, trace.layers, [s.tokens_out for s in trace.stages], text))
        if hook:
            hook.remove()
    assert found[0] == found[1]
    assert sum(found[0][0]) < sum(trace.visual_tokens), "something is dropped"
