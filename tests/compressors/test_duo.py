"""Gates of streaming heads from a file, as DuoAttention's authors publish them or as JSON."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from modes import greedy

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError
from vtoken.evals.cost.flops import account

GATES = ((0.9, 0.1), (0.2, 0.3), (0.8, 0.05), (1.0, -2e-5))
TSV = "".join("\t".join(f"{x:.18e}" for x in row) + "\n" for row in GATES)
THIN = {"sink": 0, "window": 1, "size": 16, "min_len": 0}


def pipeline(gates):
    return config.load([{"static_sparse": {**THIN, "gates": gates}}])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Paths are as they are written: relative ones belong to the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gates.json").write_text(json.dumps(GATES))
    (tmp_path / "full_attention_heads.tsv").write_text(TSV)
    return tmp_path


@pytest.mark.parametrize("name", ["gates.json", "full_attention_heads.tsv"])
def test_a_file_is_as_good_as_the_numbers(files, name):
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 1, "img", 30]], seed=3)
    found = []
    for gates in (GATES, name, str(files / name)):
        with vtoken.wrapped(model, pipeline(gates)):
            options = {"return_dict_in_generate": True, "output_logits": True}
            logits = torch.stack(greedy(model, batch, **options).logits)
            found.append((logits, [s.density for s in vtoken.trace(model).stages]))
    (want, densities), *others = found
    assert len({round(d[0], 6) for d in densities}) == 1 and densities[0][0] < 1, (
        "one of two heads streams in every layer"
    )
    assert all(torch.equal(got, want) and told == densities for got, told in others)
    (stage,) = pipeline(name).stages
    assert [stage.streams(k) for k in range(4)] == [(False, True), (True, False), (False, True), (False, True)]
    assert account(model.config, pipeline(name)) == account(model.config, pipeline(GATES))


def test_the_cache_reads_the_same_files(files):
    model = tiny.make("llava")
    batch = tiny.build(model, [[3, "img", 1, "img", 30]], seed=3)
    found = []
    for gates in (GATES, "gates.json", "full_attention_heads.tsv"):
        loaded = config.load([{"streaming_cache": {"sink": 1, "recent": 2, "gates": gates}}])
        with vtoken.wrapped(model, loaded):
            found.append((greedy(model, batch, 12), vtoken.trace(model).cached))
        (stage,) = loaded.stages
        assert [stage.streams(k) for k in range(4)] == [(False, True), (True, False), (False, True), (False, True)]
    assert all(torch.equal(ids, found[0][0]) and cached == found[0][1] for ids, cached in found)
    with pytest.raises(OtherModelError, match=r"streaming_cache: the gates .* are for 2 key heads in a layer.* has 4"):
        vtoken.wrap(tiny.family("llava").make(num_key_value_heads=4), loaded)
    with pytest.raises(OtherModelError, match=r"streaming_cache: gates are for 1 decoder layers, this model has 4"):
        vtoken.wrap(model, [{"streaming_cache": {"gates": [[0.1, 0.2]]}}])


def test_a_file_stays_a_file(files):
    told = config.load("static_sparse:gates=full_attention_heads.tsv,sparsity=0.25")
    assert "gates: full_attention_heads.tsv" in config.dump(told)


@pytest.mark.parametrize(
    "name, text, words",
    [
        (
            "gone.json",
            None,
            r"no file 'gone.json'; take a path to JSON \[\[...\], ...\] or to the authors' full_attention",
        ),
        ("a.json", "[[0.1, 0.2], [0.3]]", "a.json must hold equally many numbers for every layer.*layers of 1 and 2"),
        ("a.json", "[]", "one per key head, not no layers"),
        ("a.json", '{"gates": [[0.1]]}', "a.json must hold a list per decoder layer"),
        ("a.json", "[0.1, 0.2]", "a.json must hold a list per decoder layer"),
        ("a.json", '[["high"]]', "a.json must hold finite numbers, not 'high'"),
        ("a.json", "[[NaN]]", "a.json must hold finite numbers, not nan"),
        ("a.json", "[[0.1,", "a.json is no JSON"),
        ("a.txt", TSV, "tables with tabs must be called .tsv"),
        ("a.tsv", "0.1\t0.2\n0.3\t\n", "a.tsv is no table of numbers with tabs between them"),
        ("a.tsv", "0.1\t0.2\n0.3\n", "a.tsv must hold equally many numbers"),
        ("a.tsv", "\n", "one per key head, not no layers"),
        ("a.tsv", "0.1\tinf\n", "a.tsv must hold finite numbers, not inf"),
        ("a.json", b"\xff\xfe", "a.json is no JSON"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(files, name, text, words):
    if text is not None:
        (files / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=rf"option 'gates': {words}" if name in words else words):
        pipeline(name)


@pytest.mark.parametrize("gates, words", [(5, "not 5"), ([["x"]], "'gates.0.0': Input .* not 'x'"), ([], "no layers")])
def test_what_is_wrong_with_numbers_is_said(gates, words):
    with pytest.raises(ConfigError, match=words) as error:
        pipeline(gates)
    assert "tuple" not in str(error.value) and "a list of a list of a number or text" in str(error.value)


@pytest.mark.parametrize("stage", ["static_sparse", "streaming_cache"])
def test_a_sparsity_without_gates_is_refused(stage):
    """All heads would stream whatever it is."""
    with pytest.raises(ConfigError, match=r"sparsity 0\.85 needs gates; without them all heads stream"):
        config.load([{stage: {"sparsity": 0.85}}])


def test_gates_of_another_model(files):
    (files / "short.json").write_text("[[0.1, 0.2], [0.3, 0.4]]")
    (files / "wide.json").write_text(json.dumps([[0.1] * 4] * 4))
    with pytest.raises(OtherModelError, match=r"the gates 'short.json' are for 2 decoder layers, this model has 4"):
        vtoken.wrap(tiny.llava(), pipeline("short.json"))
    with pytest.raises(
        UnsupportedError, match=r"the gates 'wide.json' are for 4 key heads in a layer, this model has 2"
    ):
        vtoken.wrap(tiny.make("llava"), pipeline("wide.json"))
