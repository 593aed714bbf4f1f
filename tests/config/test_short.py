"""Pipelines in one line: a stage or a preset, its budget, options and policies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from caught import catch, ends, lmms_model

import vtoken
from vtoken import config, registry
from vtoken.cli import main
from vtoken.config.policies import KEYS
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.quality.options import Sweep
from vtoken.evals.shared.yaml_options import read
from vtoken.session import session_of

POLICIES = {"positions": "compact", "newline": "drop", "anyres": "2x2", "min_visual_tokens": 9}


@pytest.mark.parametrize(
    ("text", "stage"),
    [
        ("fastervlm:64,{}", {"fastervlm": {"keep": 64}}),
        ("random:25%,{},seed=3", {"random": {"keep": "25%", "seed": 3}}),
        ("random:seed=3,{},keep={{total: 640}}", {"random": {"keep": {"total": 640}, "seed": 3}}),
        ("pool,{}", "pool"),
        ("pool:{}", "pool"),
        ("prumerge,plus=true, {}", {"prumerge": {"plus": True}}),
        ("fitprune:table=[3, 1],{},tokens=9", {"fitprune": {"table": [3, 1], "tokens": 9}}),
    ],
)
@pytest.mark.parametrize("key", POLICIES)
def test_policies_stand_behind_a_stage(text: str, stage: Any, key: str) -> None:
    written = text.format(f"{key}={POLICIES[key]}")
    pipeline = config.load(written)
    assert pipeline == replace(config.load({key: POLICIES[key], "stages": [stage]}), name=written)


@pytest.mark.parametrize("name", ["fastervlm-64", "flowcut-next-160", "none"])
def test_policies_stand_behind_a_preset(name: str) -> None:
    written = f"{name},positions=original,min_visual_tokens=7"
    want = replace(config.load(name), name=written, positions="original", min_visual_tokens=7)
    assert config.load(written) == want


def test_no_stage_calls_an_option_as_a_policy_is_called() -> None:
    stages, _ = registry.catalogue()
    assert not {(name, key) for name, cls in stages.items() for key in KEYS if key in cls.model_fields}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("fastervlm:64,positions=kompact", "positions must be original or compact, not 'kompact'"),
        ("fastervlm:64,positons=compact", "stage 'fastervlm': unknown option 'positons'"),
        ("fastervlm:64,positions=compact,positions=original", "option 'positions' is given twice"),
        ("fastervlm:64,preset=fastervlm-64", "unknown option 'preset'"),
        ("fastervlm:64,min_visual_tokens=-1", "min_visual_tokens must be a whole number >= 0, not -1"),
        ("fastervlm,64", "a stage and its budget, as in fastervlm:64"),
        (["fastervlm:64,positions=compact"], "; positions is a policy of the whole pipeline, write it beside stages"),
        ([{"pool": {"newline": "drop"}}], "; newline is a policy of the whole pipeline, write it beside stages"),
    ],
)
def test_what_is_wrong_is_said(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(given)
    assert message in str(caught.value)


TWO = ("uniform:4,positions=compact", "fastervlm-64,min_visual_tokens=600")


def test_wrap_takes_it() -> None:
    model = tiny.llava()
    for each in TWO:
        with vtoken.wrapped(model, each):
            session = session_of(model)
            assert session is not None and session.pipeline == config.load(each)


def test_commands_take_lists_of_it(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Pipelines are parted by spaces, so that a comma is the pipeline's own."""
    found: list[Any] = []
    monkeypatch.setattr("vtoken.evals.speed.latency.bench", catch(found, 1))
    ends(["bench", "tiny-llava", *TWO])
    assert found == [[config.load(each) for each in TWO]]
    assert main(["flops", "tiny-llava", *TWO, "--json"]) == 0
    assert [each["pipeline"] for each in json.loads(capsys.readouterr().out)["accounts"][1:]] == list(TWO)


def test_sweeps_take_it(tmp_path: Path) -> None:
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"model": "tiny-llava", "tasks": ["a"], "pipelines": list(TWO)}))
    assert read(Sweep, file).all_pipelines() == [config.load(each) for each in TWO]


def test_lmms_eval_parts_policies_from_the_pipeline() -> None:
    """It splits `--model_args pipeline=uniform:64,positions=compact` at every comma."""
    cls = lmms_model()
    model = cls("tiny-llava", pipeline="uniform:64", positions="compact", min_visual_tokens=9, device="cpu")
    assert model.generator.pipeline == config.load("uniform:64,positions=compact,min_visual_tokens=9")
    with pytest.raises(ConfigError, match="positions must be original or compact, not 'kompact'"):
        cls("tiny-llava", pipeline="uniform:64", positions="kompact", device="cpu")
    with pytest.raises(UnsupportedError, match=r'^pipeline "vtw-15,newline=drop": stage vtw'):
        cls("tiny-llava", pipeline="vtw-15", newline="drop", device="cpu")
    with pytest.raises(ConfigError, match="unknown model_args: positons"):
        cls("tiny-llava", pipeline="uniform:64", positons="compact", device="cpu")


def budgeted() -> list[str]:
    stages, _ = registry.catalogue()
    needed = {name: {n for n, f in cls.model_fields.items() if f.is_required()} for name, cls in stages.items()}
    return [name for name, cls in stages.items() if "keep" in cls.model_fields and needed[name] <= {"keep"}]


@pytest.mark.parametrize("name", budgeted())
@pytest.mark.parametrize("rest", ["", ",positions=compact"])
def test_a_budget_that_no_preset_has_is_had_from_the_stage(name: str, rest: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(f"{name}-97{rest}")
    assert f"unknown preset '{name}-97', did you mean '{name}:97{rest}' (the stage with its defaults)?" in str(
        caught.value
    )
    assert config.load(f"{name}:97{rest}")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("fastervlm-12%", "'fastervlm:12%'"),
        ("pool-3", "'pool-2'"),
        ("vtw-16", "'vtw-15'"),
        ("fastervlm-0", "'fastervlm-"),
    ],
)
def test_other_names_are_compared_with_the_presets(name: str, meant: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown preset '{name}', did you mean {meant}") as caught:
        config.load(name)
    assert "`vtoken list` shows all" in str(caught.value) and len(str(caught.value)) < 250


def test_a_file_is_told_to_take_stages(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("positions: compact\npreset: fastervlm-96\n")
    with pytest.raises(
        ConfigError, match=rf"^{file}:2: unknown preset 'fastervlm-96', did you mean 'stages: \[fastervlm:96\]' "
    ):
        config.load(file)


@pytest.mark.parametrize("start", ["fastervlm-96,positions=", "fastervlm:96,positions=", "fastervlm-64,positions="])
def test_a_message_does_not_repeat_all_of_a_long_text(start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(start + 5000 * "y")
    assert 300 * "y" not in str(caught.value)


@pytest.mark.parametrize("text", ["dyvte:gates=missing.yaml", "dyvte,gates=missing.yml", "fastv-128,layer=x.yaml"])
def test_a_value_that_names_a_yaml_file_is_no_pipeline_file(text):
    with pytest.raises(ConfigError, match=r"gates|layer"):
        config.load(text)
