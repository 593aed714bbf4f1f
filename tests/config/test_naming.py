"""Errors say which pipeline they are about, as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny

import vtoken
from vtoken import config, registry
from vtoken.cli import main
from vtoken.errors import ConfigError, OtherModelError, UnsupportedError, VtokenError
from vtoken.evals.cost.flops import account
from vtoken.evals.speed.latency import bench


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.llava()


def refusals(model: Any) -> dict[str, str]:
    """Presets that the tiny model does not take."""
    found = {}
    for name in registry.presets():
        try:
            with vtoken.wrapped(model, name):
                pass
        except VtokenError as error:
            found[name] = str(error)
    return found


def test_every_refusal_of_a_preset_names_it(model: Any) -> None:
    messages = refusals(model)
    assert len(messages) > 10
    assert all(text.startswith(f'preset "{name}": ') and text.count(name) == 1 for name, text in messages.items())


@pytest.mark.parametrize("act", ["wrap", "flops", "bench"])
def test_whoever_refuses_names_the_pipeline(act: str, model: Any, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages: [fastv: {keep: 4, layer: 9}]")
    over = tmp_path / "over.yaml"
    over.write_text("preset: vtw-15\n")
    acts = {
        "wrap": lambda pipeline: vtoken.wrap(model, pipeline),
        "flops": lambda pipeline: account(model.config, config.load(pipeline)),
        "bench": lambda pipeline: bench(model, [pipeline], repeats=1, warmup=0, new_tokens=1),
    }
    for given, start in {
        "vtw-15": 'preset "vtw-15": stage vtw',
        "vtw-15,newline=drop": 'preset "vtw-15,newline=drop": stage vtw',
        "fastv:4,layer=9": 'pipeline "fastv:4,layer=9": stage fastv',
        str(file): f"{file}: stage fastv",
        str(over): f'{over} (preset "vtw-15"): stage vtw',
        "fitprune-40": 'preset "fitprune-40": stage fitprune',
    }.items():
        with pytest.raises(UnsupportedError) as caught:
            acts[act](given)
        assert str(caught.value).startswith(start) and str(caught.value).count(start[:8]) == 1
    with pytest.raises(UnsupportedError, match=r'^preset "vtw-15": stage vtw'):
        acts[act](config.load({"preset": "vtw-15"}))
    with pytest.raises(UnsupportedError, match=r"^stage fastv"):
        acts[act](config.load([{"fastv": {"keep": 4, "layer": 9}}]))


def test_the_kind_of_error_stays(model: Any) -> None:
    with pytest.raises(OtherModelError, match=r'^preset "var_filter-fastv-64": stage var_filter'):
        vtoken.wrap(model, "var_filter-fastv-64")


@pytest.mark.parametrize(
    ("given", "start"),
    [
        ("fastervlm:0", "pipeline \"fastervlm:0\": stage 'fastervlm': option 'keep'"),
        ("pool:size=2,size=3", "pipeline \"pool:size=2,size=3\": option 'size' is given twice; remove one"),
        ("pool:size=[", "pipeline \"pool:size=[\": '[' is not a value of 'size'"),
        ("vtw-15,positions=kompact", 'preset "vtw-15,positions=kompact": positions must be original or compact'),
        (["pool:size=["], "'pool:size=[': '[' is not a value of 'size'"),
        (["fastervlm:0"], "stage 'fastervlm': option 'keep'"),
    ],
)
def test_what_does_not_read_is_named_once(given: Any, start: str) -> None:
    with pytest.raises(ConfigError) as caught:
        config.load(given)
    assert str(caught.value).startswith(start)


def test_a_stage_of_a_list_in_a_file_has_its_line(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages:\n  - pool\n  - random:4,seed=[\n")
    with pytest.raises(ConfigError, match=rf"^{file}:3: 'random:4,seed=\[': "):
        config.load(file)


def test_commands_name_it_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops", "tiny-llava", "fastervlm:64", "vtw-15"]) == 2
    assert capsys.readouterr().err.startswith('vtoken: error: preset "vtw-15": stage vtw')


def test_a_name_is_no_part_of_what_a_pipeline_is() -> None:
    assert config.load({"preset": "vtw-15"}) == config.load("vtw-15")
