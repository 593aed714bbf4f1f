"""`vtoken list`: a line per stage, filters, and everything about one of them."""

from __future__ import annotations

import json

import pytest
import tiny

from vtoken import config, registry
from vtoken.cli import main
from vtoken.commands import _one as one
from vtoken.commands import list as list_command

FRAMES = {"frames_changed", "frames_farthest", "frames_relevant", "frames_uniform"}


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == "" and found["broken"] == {}
    assert [s["stage"] for s in found["stages"]] == registry.stages()
    assert [p["preset"] for p in found["presets"]] == registry.presets()
    by_name = {s["stage"]: s for s in found["stages"]}
    assert by_name["fastervlm"]["needs"] == ["cls_attention"]
    assert by_name["random"]["options"] == {
        "keep": {"required": True, "default": None},
        "seed": {"required": False, "default": 0},
    }
    assert by_name["pool"]["kind"] == "compressor" and by_name["pool"]["site"] == "tokens"
    assert {p["preset"]: p["stages"] for p in found["presets"]}["fastervlm-64"] == [{"fastervlm": {"keep": 64}}]


def test_list_is_a_line_per_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines, _, rest = capsys.readouterr().out.partition("\n\n")
    assert [line.split()[:2] for line in lines.splitlines()] == [[n, registry.stage(n).site] for n in registry.stages()]
    assert "fastervlm            tokens     keep the patches that the vision encoder's CLS token attends to." in lines
    assert {*registry.presets()} <= {*rest.split()} and max(map(len, rest.splitlines())) <= 80
    assert "NAME:64 is the bare stage with its defaults" in " ".join(rest.split())


def test_a_terminal_cuts_lines_off(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert main(["list", "--site", "encoder"]) == 0
    lines = capsys.readouterr().out.partition("\n\n")[0].splitlines()
    assert max(map(len, lines)) == 60 and any(line.endswith("…") for line in lines)


def test_list_filters(capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*words: str) -> tuple[set[str], set[str]]:
        assert main(["list", *words, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        return {row["stage"] for row in found["stages"]}, {row["preset"] for row in found["presets"]}

    assert listed("--site", "frames") == (FRAMES, set())
    stages, presets = listed("--site", "tokens", "--fact", "features")
    assert stages == {"prunesid", "scope", "visionzip", "vispruner"} == {name.partition("-")[0] for name in presets}
    every = {*registry.stages()}
    # Without scores nothing is known of frames_relevant.
    assert every - listed("--family", "llava")[0] == FRAMES - {"frames_relevant"} | {"pixelprune", "resize"}


def test_list_says_when_nothing_fits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--site", "frames", "--fact", "keys"]) == 0
    assert capsys.readouterr().out.startswith("no stage fits\n\npresets: none\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--site", "token"], "unknown site 'token', did you mean 'tokens'? Known: attention, cache,"),
        (["--fact", "key"], "unknown fact 'key', did you mean 'keys'?"),
        (["--family", "lava"], "unknown family 'lava', did you mean 'llava'?"),
        (["fastervlm-46"], "unknown stage or preset 'fastervlm-46', did you mean 'fastervlm-64'"),
        (["fastervlm", "--costs"], "`vtoken list fastervlm` takes --json alone"),
    ],
)
def test_list_refuses(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", *words]) == 2
    assert message in capsys.readouterr().err


def test_list_of_one_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "fastv"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    said = " ".join(out.split())
    assert said.startswith("fastv: a pruner at site decoder FastV: drop the visual tokens")
    assert "layer=2 K, the first decoder layer that sees fewer tokens (a whole number >= 1)" in said
    assert 'keep="50%" tokens left after the cut; the authors drop half (a count per image (64)' in said
    assert f"{', '.join(tiny.families(states=()))}: yes" in said
    assert "fastv-50 FastV (https" in said and 'example vtoken.wrap(model, "fastv")' in said


def test_list_of_one_stage_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "dpn_routed", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["options"]["routers"] == {
        "required": True,
        "default": None,
        "accepts": "text",
        "description": "safetensors file with the routers that the LLM was fine-tuned with",
    }
    assert found["families"]["llava"]["answer"] == "depends" and found["presets"] == []
    assert found["example"] == "dpn_routed:routers=ROUTERS"


def test_list_of_one_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "fastervlm-64"]) == 0
    out = capsys.readouterr().out
    assert "positions: compact\n" in out and "- fastervlm: {keep: 64}" in out and "64 of the 576 visual" in out
    assert main(["list", "fastervlm-64", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["stages"] == [{"fastervlm": {"keep": 64}}]


@pytest.mark.parametrize("name", registry.stages())
def test_every_option_is_described_and_every_example_reads(name: str) -> None:
    cls = registry.stage(name)
    assert not [option for option, field in cls.model_fields.items() if not field.description]
    example = one.example(cls)
    needed = {option for option, f in cls.model_fields.items() if f.is_required()} - {"keep"}
    blanks = [f"{option}={option.upper()}" in example for option in needed]
    if not any(blanks):  # else weights that nobody publishes
        assert cls in map(type, config.load(example).stages)
    assert all(blanks) or not any(blanks)


def test_list_as_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if line.startswith("| fastervlm |"))
    assert "| cls_attention | keep | [2412.01818](https://arxiv.org/abs/2412.01818) |" in row
    assert next(line for line in lines if line.startswith("| pool-2 |")).startswith(
        "| pool-2 | original | pool (size=2) |"
    )


def test_budgets_are_shown_as_they_are_written() -> None:
    stages = [{"uniform": {"keep": {"per_crop": 64}, "seed": 3}}]
    assert list_command._text("stages", stages) == "uniform (keep={per_crop: 64}, seed=3)"


def test_list_tells_what_is_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(registry, "catalogue", lambda: ({}, {"middle": "its import fails"}))
    assert main(["list"]) == 0
    assert capsys.readouterr().err == "broken: middle: its import fails\n"
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["broken"] == {"middle": "its import fails"}
