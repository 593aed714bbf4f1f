"""Options that cannot fit a model are refused by `wrap` and by the FLOPs account, before anything runs."""

from __future__ import annotations

import pytest
import tiny

import vtoken
from vtoken.config import load
from vtoken.errors import UnsupportedError
from vtoken.evals.cost.flops import account

HEADS = [["a_shape"] * 4] * 3


@pytest.mark.parametrize("family", tiny.families(window=None))
@pytest.mark.parametrize(
    ("stage", "why"),
    [
        ({"visionzip": {"keep": 2, "heads": 3}}, "heads: 3 does not divide the encoder's keys"),
        ({"vflowopt": {"keep": 4, "merge": 3}}, "merge: 3 patches are not what this model makes into one token"),
        ({"vflowopt": {"keep": 4, "merge": 3, "alpha": 0.1}}, "merge: 3 patches"),
        ({"var_filter": {"layer": 1, "dims": [10_000]}}, r"channels \[10000\] of another LLM"),
        ({"static_sparse": {"gates": [[0.1] * 3] * 4}}, "3 key heads in a layer, this model has 2"),
        ({"static_sparse": {"gates": [[0.1] * 2] * 3}}, "3 decoder layers, this model has 4"),
        ({"mminference": {"heads": [["a_shape"] * 3, *HEADS]}}, "patterns for 3 heads in a layer, this model has 4"),
        ({"mminference": {"heads": HEADS}}, "patterns for 3 decoder layers, this model has 4"),
    ],
    ids=lambda x: x[:20] if isinstance(x, str) else next(iter(x)),
)
def test_wrap_tells(family, stage, why):
    model = tiny.make(family)
    with pytest.raises(UnsupportedError, match=why):
        vtoken.wrap(model, [stage])
    with vtoken.wrapped(model, "random:4"):
        pass  # nothing was left on it
    with pytest.raises(UnsupportedError, match=why):
        account(model.config, load([stage]))


def test_features_of_the_first_layer_leave_none_to_stages_of_the_tower():
    model = tiny.llava()
    model.config.vision_feature_layer = [1, -1]
    with pytest.raises(UnsupportedError, match=r"encoder layers \[0, 1\]; this model allows none \(features are read"):
        vtoken.wrap(model, [{"flowcut": {"keep": 4}}])


@pytest.mark.parametrize("family", tiny.each("mrope", window=None))
def test_what_fits_is_taken(family):
    model = tiny.make(family)
    patches = tiny.family(family).unit
    for merge in {1, patches}:
        with vtoken.wrapped(model, [{"vflowopt": {"keep": 4, "merge": merge}}]):
            pass
    with vtoken.wrapped(model, [{"vflowopt": {"keep": 4, "merge": patches, "alpha": 0.1}}]):
        pass


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_cache_of_another_name_is_refused(family, monkeypatch):
    """Hooks would not find it, do nothing and say nothing."""
    model = tiny.make(family)
    monkeypatch.setattr(tiny.adapter(model).lm, "forward", lambda inputs_embeds=None, kv=None: None)
    with pytest.raises(UnsupportedError, match="so nothing would be pruned"):
        vtoken.wrap(model, "random:4")
