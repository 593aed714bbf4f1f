"""YAML as a person reads it: numbers, tags, sizes and depths, in pipeline files, short forms, sweep files and search
spaces alike."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vtoken import config
from vtoken.config import yaml_source as source
from vtoken.errors import ConfigError
from vtoken.evals.quality.options import Sweep
from vtoken.evals.shared.options import Options
from vtoken.evals.shared.yaml_options import read
from vtoken.evals.tune.space import Space


def pipeline_file(value: str, folder: Path) -> Any:
    file = folder / "mine.yaml"
    file.write_text(f"stages:\n  - random:\n      keep: {value}\n", encoding="utf-8")
    return config.load(file).stages[0].keep.plain()


def short_form(value: str, folder: Path) -> Any:
    return config.load(f"random:{value}").stages[0].keep.plain()


def named_option(value: str, folder: Path) -> Any:
    return config.load(f"random:seed=0,keep={value}").stages[0].keep.plain()


def stage_in_a_list(value: str, folder: Path) -> Any:
    return config.load([f"random:{value}"]).stages[0].keep.plain()


def behind_a_preset(value: str, folder: Path) -> Any:
    return config.load(f"pool-2,min_visual_tokens={value}").min_visual_tokens


def strict(cls: type[Options], text: str, folder: Path) -> Any:
    file = folder / "given.yaml"
    file.write_text(text, encoding="utf-8")
    return read(cls, file)


def sweep_file(value: str, folder: Path) -> Any:
    given = strict(Sweep, f"model: m\ntasks: [t]\nmethods: [random]\nbudgets:\n  - {value}\n", folder)
    return given.all_pipelines()[0].stages[0].keep.plain()


def sweep_limit(value: str, folder: Path) -> Any:
    return strict(Sweep, f"model: m\ntasks: [t]\nlimit: {value}\n", folder).limit


def search_space(value: str, folder: Path) -> Any:
    given = strict(Space, f"alternatives: {{a: [random: {{keep: {{values: [{value}]}}}}]}}\n", folder)
    return given.check()[0].stages[0].keep.plain()


Form = Callable[[str, Path], Any]
FORMS = [
    pipeline_file, short_form, named_option, stage_in_a_list, behind_a_preset, sweep_file, sweep_limit, search_space,
]  # fmt: skip
every_form = pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)


def refusal(form: Form, value: str, folder: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        form(value, folder)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1500
    return message


LAUGHS = "{a: &a [x,x,x,x,x,x,x,x,x,x]" + "".join(
    f", {name}: &{name} [{','.join(['*' + before] * 10)}]" for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
MERGES = "{a: &a {k: 1}" + "".join(
    f", {name}: &{name} {{<<: [{','.join(['*' + before] * 10)}]}}"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)
CHAIN = "[&a0 [x]" + "".join(f", &a{k} [*a{k - 1}]" for k in range(1, 300)) + "]"

REFUSED = {
    "3:32": "as people write it",  # 212 in YAML 1.1
    "064": "as people write it",  # 52
    "-064": "as people write it",
    "0x40": "as people write it",
    "0b11": "as people write it",
    "1_000": "as people write it",
    "1:30.5": "as people write it",
    "0.5_0": "as people write it",
    ".inf": "not a finite number",
    "-.INF": "not a finite number",
    ".nan": "not a finite number",
    "1e999": "too large",
    "9" * 25: "64 bits",
    "9" * 5000: "64 bits",
    "!!bool abc": "tag '!!bool' is not read",
    "!!timestamp abc": "tag '!!timestamp' is not read",
    "!!int ''": "tag '!!int' is not read",
    "!!int 0x40": "as people write it",
    "!!float ''": "tag '!!float' is not read",
    "!!null 3": "tag '!!null' is not read",
    "{!!binary aGk=: 1}": "tag '!!binary' is not read",
    "!!binary aGk=": "tag '!!binary' is not read",
    "!!set {a}": "tag '!!set' is not read",
    "!!omap [a: 1]": "tag '!!omap' is not read",
    "!!str [a]": "tag '!!str' is not read",
    "!mine 3": "tag '!mine' is not read",
    "!!python/name:os.getcwd ''": "tag '!!python/name:os.getcwd' is not read",
    "{[a]: 1}": "a key must be a name",
    "{? {a: b} : 1}": "a key must be a name",
    "&a [*a]": "inside of what it names",
    "&a {<<: *a}": "inside of what it names",
    "[" * 60 + "]" * 60: "nested more than 50 deep",
    "{a: " * 60 + "1" + "}" * 60: "nested more than 50 deep",
    CHAIN: "nested more than 50 deep with its aliases",
    LAUGHS + "}": "more than 1,000,000 characters with its aliases",
    MERGES + "}": "more than 1,000,000 characters with its aliases",
    "{a: 1, a: 2}": "duplicate key 'a'",
    "\x07": "not valid YAML",
    "*nobody": "not valid YAML",
}


@every_form
@pytest.mark.parametrize("value", REFUSED, ids=lambda value: value[:12].encode("unicode_escape").decode())
def test_what_a_person_reads_otherwise_is_refused(form: Form, value: str, tmp_path: Path) -> None:
    assert REFUSED[value] in refusal(form, value, tmp_path)


@every_form
@pytest.mark.parametrize("value", ["64", "+64", "!!int 64", "&a 64"])
def test_what_a_person_reads(form: Form, value: str, tmp_path: Path) -> None:
    assert form(value, tmp_path) == 64


def test_the_line_of_a_number(tmp_path: Path) -> None:
    assert refusal(pipeline_file, "064", tmp_path).startswith(f"{tmp_path / 'mine.yaml'}:3: '064' is not a number")
    assert "random:3:32" in refusal(short_form, "3:32", tmp_path)
    assert "NAME:64,option=value" in refusal(short_form, "3:32", tmp_path)


def test_laughs_cost_nothing(tmp_path: Path) -> None:
    tracemalloc.start()
    try:
        refusal(short_form, LAUGHS + "}", tmp_path)
        refusal(sweep_limit, MERGES + "}", tmp_path)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * 2**20


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 1e-3), ("1E5", 1e5), ("2.5e3", 2500.0), (".5", 0.5), ("3.", 3.0), ("-0.25", -0.25), ("!!float 3", 3.0),
        ("0", 0), ("-0", 0), ("25%", "25%"), ("'064'", "064"), ("!!str 064", "064"), ("2001-01-01", "2001-01-01"), ("=", "="),
        ("yes", True), ("~", None), ("1.2.3", "1.2.3"), ("e5", "e5"), ("", None), ("!!seq [1]", [1]),
    ],
)  # fmt: skip
def test_plain_values(text: str, value: Any) -> None:
    found, _ = source.parse(text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "value", ["1e3", "1e-3", "064", "3:32", "2001-01-01", ".inf", "=", "yes", "", "64", 1e-5, 1e16, 0.1, 2**62, None]
)
@pytest.mark.parametrize("flow", [True, None])
def test_what_is_written_is_read_back(value: Any, flow: bool | None) -> None:
    data = {"value": value, "more": [value]}
    assert source.parse(source.dump(data, flow))[0] == data
    assert source.parse(source.dump(value, flow))[0] == value


def test_a_merged_key_may_be_overridden(tmp_path: Path) -> None:
    text = "stages:\n  - random: &a\n      keep: 64\n      seed: 1\n  - random:\n      <<: *a\n      keep: {last}\n"
    file = tmp_path / "mine.yaml"
    file.write_text(text.format(last=32))
    first, second = config.load(file).stages
    assert (first.keep.plain(), first.seed) == (64, 1) and (second.keep.plain(), second.seed) == (32, 1)
    file.write_text(text.format(last=0))
    with pytest.raises(ConfigError, match=r"mine.yaml:7: .* at least 1 token"):
        config.load(file)
    file.write_text(text.format(last=3).replace("seed: 1", "seed: x"))
    with pytest.raises(ConfigError, match=r"mine.yaml:4: "):
        config.load(file)
    file.write_text(text.format(last="3\n      keep: 4"))
    with pytest.raises(ConfigError, match=r"mine.yaml:8: duplicate key 'keep', first on line 7"):
        config.load(file)


def test_a_large_file_that_says_it_all_is_read() -> None:
    data = {"heads": [[{"pattern": "vertical", "keep": k} for k in range(64)] for _ in range(8)]}
    assert source.parse(source.dump(data))[0] == data


@pytest.mark.parametrize("value", ["[" * 3000, "{a: " * 3000, "- " * 3000 + "a"])
def test_thousands_of_levels(value: str) -> None:
    with pytest.raises(ConfigError, match="nested more than 50 deep"):
        source.parse(value)
