"""MoA's plans: a window per head, from a file."""

from __future__ import annotations

import json
import re

import pytest
import tiny
import torch
from modes import greedy

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.evals.cost.flops import account

THIN = {"sink": 16, "size": 64, "min_len": 0}
WIDE, NARROW = [0.0, 1.0], [64.0, 0.0]
# Placeholders of the first row: three blocks of 64, of which the middle one is neither first nor latest for the last.
ROWS = [[160, "img", 30], [150, "img", 24]]


def pipeline(file, **more):
    return config.load([{"static_sparse": {**THIN, "plan": str(file), **more}}])


def written(path, told):
    path.write_text(json.dumps(told))
    return path


def by_layer(rows):
    return {k: dict(enumerate(row)) for k, row in enumerate(rows)}


@pytest.mark.parametrize("family", tiny.families(leading=True))
def test_wide_windows_are_dense_and_narrow_ones_are_not(family, tmp_path):
    model = tiny.make(family)
    batch = tiny.build(model, ROWS, seed=3)
    options = {"return_dict_in_generate": True, "output_logits": True}
    want = torch.stack(greedy(model, batch, **options).logits)
    found = {}
    for name, pair in (("wide", WIDE), ("narrow", NARROW)):
        file = written(tmp_path / f"{name}.json", by_layer([[pair] * 4] * 4))
        with vtoken.wrapped(model, pipeline(file)):
            found[name] = torch.stack(greedy(model, batch, **options).logits)
            densities = [s.density for s in vtoken.trace(model).stages if s.density is not None]
        assert densities and all((d[0] == 1) == (name == "wide") for d in densities)
    assert torch.allclose(found["wide"], want, atol=1e-4)
    assert not torch.allclose(found["narrow"], want, atol=1e-2)


def test_every_head_has_its_own(tmp_path):
    model = tiny.make("llava")
    rows = [[NARROW, WIDE, WIDE, NARROW], [WIDE] * 4, [NARROW] * 4, [[0.0, 0.5]] * 4]
    file = written(
        tmp_path / "plan.json",
        {"alphas": [[a for a, _ in row] for row in rows], "betas": [[b for _, b in row] for row in rows]},
    )
    with vtoken.wrapped(model, pipeline(file)):
        greedy(model, tiny.build(model, [[300, "img", 30]]))
        told = [s.density[0] for s in vtoken.trace(model).stages]
    length = 300 + tiny.TOKENS + 30
    (stage,) = pipeline(file).stages
    assert told == [pytest.approx(stage.density(length, k), abs=1e-6) for k in range(4)]
    assert told[1] == 1 and told[0] == pytest.approx((1 + told[2]) / 2, abs=1e-6) and told[2] < told[3] < 1
    assert (
        account(model.config, pipeline(file), text_tokens=330).prefill_attention
        < account(model.config, text_tokens=330).prefill_attention
    )


def test_what_is_wrong_with_a_plan_is_said(tmp_path):
    good = [[[1, 0.5], [2, 0.5]]] * 2
    odd = (
        ([[[1, 2]]], 'must hold {"0": {"0": [alpha, beta]'),
        ({"0": {"0": [1, 2]}, "2": {"0": [1, 2]}}, "must hold one entry after the other, from 0 on"),
        ({"0": {"0": [1, 2], "x": [1, 2]}}, "layer 0 must hold one entry after the other"),
        ({"0": 5}, "layer 0 must hold one entry after the other"),
        ({"0": {"0": [1]}}, "two finite numbers, alpha and beta, not [1.0] at layer 0, head 0"),
        ({"0": {"0": [1, "2"]}}, "at layer 0, head 0"),
        ({"0": {"0": [1, True]}}, "at layer 0, head 0"),
        ({"0": {"0": [1, 2]}, "1": {}}, "equally many heads for every layer, not layers of 0 and 1"),
        ({"alphas": [[1.0]], "betas": [[1.0, 2.0]]}, "as many betas as alphas in every layer"),
        ({"alphas": [[1.0]], "betas": 3}, "betas must hold one entry after the other"),
        ({"alphas": [[float("nan")]], "betas": [[1.0]]}, "two finite numbers"),
        ({}, "must hold"),
    )
    for told, words in odd:
        with pytest.raises(ConfigError, match=re.escape(words)):
            pipeline(written(tmp_path / "a.json", told))
    (tmp_path / "a.json").write_text('{"0": ')
    with pytest.raises(ConfigError, match="is no JSON"):
        pipeline(tmp_path / "a.json")
    with pytest.raises(ConfigError, match="no file"):
        pipeline(tmp_path / "gone.json")
    with pytest.raises(ConfigError, match="gates and plan both say what heads read; give one of them"):
        pipeline(written(tmp_path / "a.json", by_layer(good)), gates=[[0.1, 0.2]] * 2)


def test_plans_of_another_model(tmp_path):
    with pytest.raises(OtherModelError, match=r"the plan .* is for 2 decoder layers, this model has 4"):
        vtoken.wrap(tiny.llava(), pipeline(written(tmp_path / "a.json", by_layer([[WIDE] * 4] * 2))))
    with pytest.raises(UnsupportedError, match=r"for 3 heads in a layer, this model has 4 query heads and 2 key heads"):
        vtoken.wrap(tiny.llava(), pipeline(written(tmp_path / "a.json", by_layer([[WIDE] * 3] * 4))))
