"""Values that Python lets in: NaN and infinities, numpy's scalars and arrays, paths that cannot be opened, policies set
by hand."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any, ClassVar, get_args

import numpy as np
import pytest
import tiny
from pydantic import ValidationError

import vtoken
from vtoken import cli, config, registry
from vtoken.config import Pipeline
from vtoken.config.messages import accepts
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.shared.options import Options
from vtoken.pruners.tokens.random import Random
from vtoken.stages.budget import Budget

HUGE = [float("nan"), float("inf"), -float("inf")]


def refusal(pipeline: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(pipeline)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 3000
    return message


def numbers(node: Any) -> bool:
    """Whether a JSON Schema takes a float somewhere on its top."""
    return node.get("type") == "number" or any(numbers(each) for each in node.get("anyOf", ()))


FLOATS = [
    (name, option)
    for name in registry.stages()
    for option, node in registry.stage(name).model_json_schema().get("properties", {}).items()
    if numbers(node)
]


@pytest.mark.parametrize("value", HUGE)
def test_no_option_of_a_stage_is_nan_or_infinite(value: float) -> None:
    assert len(FLOATS) > 20
    taken = []
    for name, option in FLOATS:
        cls = registry.stage(name)
        for validate, given in (
            (cls.model_validate, {option: value}),
            (cls.model_validate_json, json.dumps({option: value})),
        ):
            with pytest.raises(ValidationError) as caught:
                validate(given)
            if not any(e["loc"][0] == option for e in caught.value.errors() if e["loc"]):
                taken.append((name, option))
    assert not taken


@pytest.mark.parametrize("value", HUGE)
def test_no_key_of_a_file_is_nan_or_infinite(value: float) -> None:
    class Mine(Options):
        share: float = 0.5
        shares: tuple[float, ...] = ()

    for given in ({"share": value}, {"shares": (0.5, value)}):
        with pytest.raises(ValidationError, match="finite"):
            Mine(**given)


def actions(parser: argparse.ArgumentParser) -> Any:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                yield from ((f"{name} {place}", each) for place, each in actions(sub))
        else:
            yield action.dest, action


def test_no_option_of_a_command_is_nan_or_infinite() -> None:
    found = []
    for command in cli.COMMANDS:
        for place, action in actions(cli._parser(command)):
            try:
                real = callable(action.type) and isinstance(action.type("0.5"), float)
            except (ValueError, argparse.ArgumentTypeError):
                continue
            if real:
                found.append(place)
                for text in ("nan", "inf", "-inf", "1e999", "x"):
                    with pytest.raises(argparse.ArgumentTypeError, match=text):
                        action.type(text)
    assert len(found) > 5 and any(place.startswith("calibrate") for place in found)


def test_whole_numbers_of_numpy() -> None:
    keep = [np.int64(64), np.uint8(64), 64]
    assert {config.load([{"random": {"keep": each, "seed": np.int32(3)}}]).stages for each in keep} == {
        (Random(keep=Budget(64), seed=3),)
    }
    assert {Budget(each) for each in keep} == {Budget(64)}
    assert Budget({"total": np.int64(64)}).plain() == {"total": 64}
    given = config.load({"positions": np.str_("compact"), "min_visual_tokens": np.int64(9), "stages": []})
    assert (given.positions, given.min_visual_tokens) == ("compact", 9)
    assert config.load(dict(preset=np.str_("pool-2"))).stages and "min_visual_tokens: 9" in config.dump(given)


ARRAYS = [
    np.array(3),
    np.array([1, 2]),
    np.array(["original", "compact"]),
    np.float32(3),
    np.bool_(True),
    np.datetime64(0, "s"),
]
KEYS = {"positions": "must be original or compact", "newline": "must be keep", "anyres": "must be model or 2x2",
        "min_visual_tokens": "must be a whole number >= 0"}  # fmt: skip


@pytest.mark.parametrize(
    "value", [*ARRAYS, float("nan"), 10**5000, -(10**5000), [[]] * 3, {}, b"compact", None], ids=type
)
def test_policies_are_words_in_every_form(value: Any) -> None:
    for key, words in KEYS.items():
        assert words in refusal({key: value, "stages": []})
        with pytest.raises(ConfigError, match=words):
            Pipeline(**{"name": "mine", "positions": "original", "stages": (), key: value})
    assert "unknown preset" in refusal({"preset": value})
    assert "stages must be a list" in refusal({"stages": value}) or isinstance(value, list)


@pytest.mark.parametrize("value", ARRAYS)
def test_arrays_are_no_options(value: Any) -> None:
    assert "must be plain data" in refusal([{"random": {"keep": value}}])
    with pytest.raises(ValidationError, match="is not a budget"):
        Random(keep=value)
    assert "a pipeline is" in refusal(value)


def test_options_too_deep_or_too_long_to_write() -> None:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    assert "must be plain data" in refusal([{"random": {"keep": deep}}])
    assert "must be plain data" in refusal([{"random": {"keep": 4, "seed": 10**5000}}])
    assert "xx...xx" in refusal("x" * 10**5)
    assert "..." in refusal([{"random": {"keep": "x" * 10**5}}])


def test_a_pipeline_by_hand_holds_stages() -> None:
    with pytest.raises(ConfigError, match=r"'fastv' is no Stage; vtoken.config.load"):
        Pipeline("mine", "original", ("fastv",))  # type: ignore[arg-type]


@pytest.mark.parametrize("suffix", ["", ".yaml"])
@pytest.mark.parametrize("path", ["x" * 5000, "/".join(["x" * 200] * 40), "a\0b"])
@pytest.mark.parametrize("kind", [str, Path])
def test_paths_that_no_system_takes(path: str, suffix: str, kind: Any) -> None:
    refusal(kind(path + suffix))


@pytest.mark.parametrize("stage", ["static_sparse:gates=", "dyvte:", "seerattention:", "dpn_routed:routers="])
@pytest.mark.parametrize("path", ["x" * 5000, "a\\0b.tsv"])
def test_weights_at_paths_that_no_system_takes(stage: str, path: str) -> None:
    stage = stage if stage.endswith("=") else f"{stage}gates="
    assert "no file" in refusal(f'{stage}"{path}"')


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_files_that_cannot_be_read(error: OSError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("stages: []\n")

    def fails(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(Path, "read_text", fails)
    for given in (file, str(file)):
        assert refusal(given) == f"cannot read {str(file)!r}: {error.strerror}"


def test_a_folder_is_no_pipeline_file(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").mkdir()
    assert "is a folder" in refusal(tmp_path / "mine.yaml")


def test_folders_are_listed_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    listed = []
    real = os.scandir

    def counting(path: Any = ".") -> Any:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "scandir", counting)
    monkeypatch.setattr(os, "listdir", lambda path=".": listed.append(path) or [e.name for e in real(path)])
    given = [{"random": {"keep": 3}}, "pool"]
    for _ in range(2):
        listed.clear()
        assert config.load(given).stages and config.load("pool-2").stages and config.load("random:3").stages
        assert "llava" in registry.adapters()
    assert not listed
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    (tmp_path / "presets").mkdir()
    assert registry.presets() == []
    (tmp_path / "presets" / "mine.yaml").write_text("variants:\n  mine:\n    stages: []\n  mine-2:\n")
    assert registry.presets() == ["mine", "mine-2"]


BUDGETED = [
    (name, option)
    for name, cls in registry.catalogue()[0].items()
    for option, field in cls.model_fields.items()
    if Budget in (field.annotation, *get_args(field.annotation))
]


@pytest.mark.parametrize(("name", "option"), BUDGETED)
def test_budgets_that_are_named_are_taken_and_no_others(name, option):
    cls, missing = registry.stage(name), {"gamma": 2.0, "relevance": [1.0, 0.5], "keep": "50%"}
    others = {key: missing[key] for key, field in cls.model_fields.items() if field.is_required() and key != option}
    words = accepts(cls, option)
    for form in (64, "25%", {"total": 640}, {"per_frame": 32}, {"per_crop": 64}):
        written = str(form).replace("'", "")
        assert f"({written})" in words or refusal([{name: {**others, option: form}}])
        if f"({written})" in words:
            config.load([{name: {**others, option: form}}])


def test_key_frames_in_any_order_and_of_a_video_without_tokens() -> None:
    """The keys of a mapping have no order; a video may have lost all its tokens to an earlier stage."""
    keep = Budget({"key_weight": 3, "per_frame": 2})
    assert keep == Budget({"per_frame": 2, "key_weight": 3}) and keep.plain() == {"per_frame": 2, "key_weight": 3}
    assert keep.counts((0, 0, 4, 4), (0, 0, 1, 1), (1, 1, 3, 1)) == (0, 0, 3, 1)


class Elsewhere(Random):
    """Of a later version of vtoken, or misspelled."""

    site: ClassVar[Any] = "moon"


def test_what_is_built_by_hand_is_refused_in_a_line() -> None:
    pipeline = config.load("none")
    assert "moon" in refused_by_wrap([Elsewhere(keep=3), "fastervlm:4"])
    for given in (pipeline, config.Contrast(pipeline)):
        assert "contrast is a mapping" in refusal({"stages": [], "contrast": given})
    with pytest.raises(ConfigError, match=r"takes a pipeline, .* not 'none'"):
        config.Contrast("none")  # type: ignore[arg-type]


def refused_by_wrap(pipeline: Any) -> str:
    with pytest.raises(UnsupportedError) as caught:
        vtoken.wrap(tiny.llava(), pipeline)
    return str(caught.value)
