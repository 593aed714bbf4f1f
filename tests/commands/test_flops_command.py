"""`vtoken flops` and the input it refuses."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import pytest
import tiny
from transformers import CLIPConfig

from vtoken.commands import flops as command
from vtoken.config import load
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import reference
from vtoken.evals.cost.flops import PARTS, account
from vtoken.evals.cost.support_matrix import attempt, without_weights
from vtoken.evals.shared.configs import resolve_config
from vtoken.evals.shared.options import declare


def test_llava_7b_by_hand() -> None:
    """Parameter counts that everyone knows: 6.74 B in Vicuna-7B (32 000 tokens), 304 M in CLIP ViT-L/14."""
    dense = account(resolve_config("llava-hf/llava-1.5-7b-hf"), text_tokens=64, new_tokens=1)
    matrices = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert dense.prefill_linear == 2 * 640 * matrices + 2 * 4096 * 32064
    assert dense.kv_bytes == 640 * 32 * 2 * 4096 * 2
    assert dense.projector == 2 * 576 * (1024 * 4096 + 4096 * 4096)
    assert dense.tower == pytest.approx(2 * 577 * 302e6 + 24 * 4 * 577**2 * 1024, rel=0.01)


def test_to_dict_is_json() -> None:
    claimed = account(tiny.llava().config, load("fastervlm:4"))
    plain = json.loads(json.dumps(claimed.to_dict()))
    assert plain["total"] == claimed.total == sum(plain[part] for part in PARTS)
    assert plain["visual_tokens"] == [4] * 4


def test_causal_half() -> None:
    config = tiny.llava().config
    claimed = account(config, text_tokens=4)
    pairs = sum(range(1, 21))
    assert claimed.prefill_attention_causal == 4 * 4 * pairs * 32
    assert claimed.prefill_attention == 4 * 4 * 20 * 20 * 32
    assert "causal" in " ".join(claimed.left_out)


def test_shipped_model(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny.llava().config
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(reference, "path", lambda name: tmp_path)
    assert account(resolve_config("tiny-llava")).total == account(config).total


def test_local_folder(tmp_path: Any) -> None:
    config = tiny.llava().config
    config.save_pretrained(tmp_path)
    assert account(resolve_config(tmp_path)).total == account(config).total


def test_bad_input(tmp_path: Any) -> None:
    config = tiny.llava().config
    with pytest.raises(ConfigError, match="images must be at least 1"):
        account(config, images=0)
    with pytest.raises(ConfigError, match="text_tokens must be at least 0"):
        account(config, text_tokens=-1)
    with pytest.raises(UnsupportedError, match="count every frame as one of `images`"):
        account(config, frames=8)
    with pytest.raises(UnsupportedError, match=f"'clip'; supported: {', '.join(tiny.FAMILIES)}"):
        account(CLIPConfig())
    with pytest.raises(UnsupportedError, match="decoder of type 'gpt2'"):
        account(type(config)(vision_config=config.vision_config, text_config={"model_type": "gpt2"}))
    with pytest.raises(ConfigError, match="no model folder"):
        resolve_config(tmp_path / "nothing")


def run(*argv: str) -> None:
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter)
    declare(parser, command)
    command.run(command.Settings.of(parser.parse_args(argv)))


def test_command_json(capsys: pytest.CaptureFixture[str]) -> None:
    run("llava-hf/llava-1.5-7b-hf", "uniform:64", "--images", "2", "--json")
    plain = json.loads(capsys.readouterr().out)
    assert [each["pipeline"] for each in plain["accounts"]] == ["dense", "uniform:64"]
    assert [each["visual_entry"] for each in plain["accounts"]] == [1152, 128]


def test_command_table(capsys: pytest.CaptureFixture[str]) -> None:
    run("llava-hf/llava-1.5-7b-hf", "uniform:64", "--image-size", "480x640")
    out = capsys.readouterr().out
    assert "uniform:64" in out
    assert "11.1%" in out
    assert "Not counted" in out


@pytest.mark.parametrize("width", [40, 80, 120, 1000])
def test_no_width_breaks_a_word(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipelines = [f"{name}:{keep}" for name in ("uniform", "divprune", "fastv") for keep in (64, 128, 192)]
    monkeypatch.setenv("COLUMNS", str(width))
    run("llava-hf/llava-1.5-7b-hf", *pipelines)
    out = capsys.readouterr().out
    assert all(f" {name} " in out for name in pipelines) and "…" not in out
    assert out.count(" dense ") == out.count("FLOPs")
    assert out.count("FLOPs") == 1 if width == 1000 else out.count("FLOPs") > 1


def test_command_pictures(capsys: pytest.CaptureFixture[str]) -> None:
    run("llava-hf/llava-v1.6-vicuna-7b-hf", "uniform:64", "--image-size", "672x1008")
    out = capsys.readouterr().out
    assert "2112 100.0%" in out and "newline tokens at entry │       32 100.0%" in out
    run("Qwen/Qwen3-VL-2B-Instruct", "--image-size", "320x640", "--frames", "7", "--images", "2")
    out = capsys.readouterr().out
    assert "newline tokens" not in out and "2 video(s) of 7 frames" in out
    assert f"{2 * 4 * 10 * 20} 100.0%" in out


def test_command_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run("--help")
    assert capsys.readouterr().out.count("vtoken flops llava-hf/") == 3
    with pytest.raises(SystemExit):
        run("tiny-llava", "--image-size", "big")
    assert "write 336 or 480x640" in capsys.readouterr().err


REFUSED = [
    ["resize:25%"],
    ["pixelprune", {"ipcv": {"keep": "35%"}}],
    [{"tome": {"r": 2}}],
    ["snapkv:25%", {"lookm": {"keep": "25%"}}],
]


@pytest.mark.parametrize("stages", REFUSED, ids=str)
def test_costs_of_what_cannot_run_are_not_told(stages: list[Any], tmp_path: Any) -> None:
    """Where `wrap` refuses, `vtoken flops` says what it says."""
    pipeline, refused = tmp_path / "pipeline.yaml", 0
    pipeline.write_text(json.dumps({"stages": stages}))
    for family in tiny.families(leading=True):
        config = tiny.make(family).config
        config.save_pretrained(tmp_path / family)
        try:
            attempt(without_weights(config), load(pipeline))
        except UnsupportedError as error:
            refused += 1
            with pytest.raises(UnsupportedError, match=re.escape(str(error).rpartition("pipeline.yaml: ")[2])):
                run(str(tmp_path / family), str(pipeline))
    assert refused
