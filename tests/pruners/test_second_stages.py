"""Methods of two and three stages as a whole, on every family: equal to recomputation, and the later stages go by what they should."""

from __future__ import annotations

from itertools import pairwise

import gates
import oracle
import pytest
import tiny
import torch
from against_oracle import compare
from batches import rows_for
from modes import families
from usual import runs
from watchers import Watcher

import vtoken
from vtoken.errors import UnsupportedError
from vtoken.stages import Fact

PIPELINES = {
    "vscan": [{"vscan": {"keep": 6, "local_layer": 1, "window": 2}}, {"vscan_late": {}}],
    "flowcut": [{"flowcut": {"keep": {"per_crop": 6}}}, {"flowcut_late": {"keep": {"total": 4}}}],
    "vflowopt": [
        {"vflowopt": {"keep": "80%", "threshold": 1.1, "cell": 2.0}},
        {"vflowopt_late": {"keep": "70%", "layer": 1, "threshold": 1.1}},
        {"vflowopt_late": {"keep": "50%", "layer": 2, "threshold": 1.1}},
    ],
}
CASES = [(family, name) for family in tiny.FAMILIES for name in PIPELINES if runs(family, PIPELINES[name])]


@pytest.mark.parametrize(("family", "stages"), CASES)
@pytest.mark.parametrize("batch", ["ragged", "video and image"])
def test_equals_recomputation(family, stages, batch):
    if rows_for(family, batch) is None:
        pytest.skip("stock LLaVA-1.5 and NeXT take no video")
    model = tiny.make(family)
    rows = rows_for(family, batch)
    trace = compare(model, tiny.build(model, rows, seed=3), {"stages": PIPELINES[stages]}, new=3, weighted=True)
    assert sum(trace.layers[-1]) < sum(trace.layers[0]) < sum(trace.visual_tokens)
    for before, after in pairwise(trace.stages):
        assert after.tokens_in == before.tokens_out


class Noting(Watcher):
    """Notes the importance that the encoder gives. No paper."""

    def needs(self):
        return (Fact("received_attention", above=1.1),)


@families
def test_later_cuts_follow_the_importance_of_the_first(family):
    """In every image what leaves is less important than what stays, by what stage 1 was told, merged tokens by their
    place."""
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    whole = Noting(at=(1,), seen={})
    with vtoken.wrapped(model, [whole]), torch.no_grad():
        model(**batch)
    told = whole.seen[1]
    importance = told.fact("received_attention", above=1.1).split(told.lengths)
    with vtoken.wrapped(model, PIPELINES["vflowopt"]), torch.no_grad():
        model(**batch)
        stages = vtoken.trace(model).stages
    for before, after in pairwise(stages):
        for score, held, kept in zip(importance, before.kept, after.kept, strict=True):
            gone = held[~torch.isin(held, kept)]
            assert set(kept.tolist()) <= set(held.tolist())
            assert not len(gone) or float(score[gone].max()) <= float(score[kept].min())
    assert any(len(kept) for kept in stages[-1].kept)


def test_a_later_cut_needs_the_encoder():
    """Features that were encoded before have no importance: refused, and the model stays usable."""
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 5]], seed=3)
    features = model.model.get_image_features(pixel_values=batch["pixel_values"], return_dict=True)
    call = {k: v for k, v in batch.items() if k != "pixel_values"} | {"mm_encoder_outputs": {"image": features}}
    with vtoken.wrapped(model, [{"vflowopt_late": {"keep": 3}}]), torch.no_grad():
        with pytest.raises(UnsupportedError, match="vflowopt_late needs received_attention"):
            model(**call)
        model(**batch)
        assert vtoken.trace(model).tokens_out == [3]


def test_layers_of_encoder_facts_are_the_encoders():
    class Late(Noting):
        """Asks for a tower layer that the decoder does not have. No paper."""

        ask: int = 0

        def needs(self):
            return (Fact("received_attention", self.ask),)

    model = tiny.llava()
    model.get_decoder().layers = model.get_decoder().layers[:2]
    with vtoken.wrapped(model, [Late(at=(1,), ask=3, seen={})]):
        pass
    with pytest.raises(UnsupportedError, match="layer 4; there are 4"):
        vtoken.wrap(model, [Late(at=(1,), ask=4, seen={})])


@families
def test_routers_scale_what_they_leave(family, monkeypatch):
    """Routers of zeros give each of three sizes, all 1, a third: nothing is pooled, and behind both layers a token
    counts a third of what it did."""
    file = gates.routers(sizes=3, loud=0.0)
    means = oracle.means
    monkeypatch.setattr(
        oracle, "means", lambda p, *rest: means(p, *rest) * torch.where(p.visual, 1 / 3, 1.0)[:, :, None]
    )
    model = tiny.make(family)
    batch = tiny.build(model, rows_for(family, "ragged"), seed=3)
    stages = [{"dpn_routed": {"routers": file, "sizes": (1, 1, 1), "least": 1}}]
    compare(model, batch, {"stages": stages, "newline": "drop"})
