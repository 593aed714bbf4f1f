"""Pipelines in all their forms: what loads, what is refused and with which words, and that YAML, schema and loader
agree."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest

from vtoken import config, registry
from vtoken.compressors.tokens.pool import Pool
from vtoken.config import Pipeline
from vtoken.config.presets import recipe, summary
from vtoken.config.schema import schema as pipeline_schema
from vtoken.config.yaml_source import parse
from vtoken.errors import ConfigError
from vtoken.pruners.tokens.fastervlm import FasterVLM
from vtoken.pruners.tokens.random import Random
from vtoken.stages import Pruner, Site
from vtoken.stages.budget import Budget

FASTER = FasterVLM(keep=64)  # type: ignore[arg-type]
RANDOM = Random(keep="25%", seed=3)  # type: ignore[arg-type]


class Late(Pruner):
    site: ClassVar[Site] = "decoder"


def refusal(pipeline: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(pipeline)
    return str(caught.value)


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def file(text: str, name: str = "mine.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return file


@pytest.mark.parametrize(
    ("given", "name", "positions", "stages"),
    [
        ("fastervlm-64", "fastervlm-64", "compact", (FASTER,)),
        ("none", "none", "original", ()),
        ("fastervlm:64", "fastervlm:64", "original", (FASTER,)),
        ("fastervlm:keep=64", "fastervlm:keep=64", "original", (FASTER,)),
        ("random:25%,seed=3", "random:25%,seed=3", "original", (RANDOM,)),
        ("random:seed=3,keep=25%", "random:seed=3,keep=25%", "original", (RANDOM,)),
        ("fastervlm:{total: 640}", "fastervlm:{total: 640}", "original", (FasterVLM(keep=Budget({"total": 640})),)),
        ("pool", "pool", "original", (Pool(size=2),)),
        ("pool:size=3", "pool:size=3", "original", (Pool(size=3),)),
        (FASTER, "fastervlm", "original", (FASTER,)),
        ([], "none", "original", ()),
        (["pool", {"random": {"keep": "25%", "seed": 3}}, FASTER], "pool+random+fastervlm", "original", (Pool(), RANDOM, FASTER)),
        ([{"random": {"keep": Budget("25%"), "seed": 3}}], "random", "original", (RANDOM,)),
        ({"positions": "compact", "stages": ["pool"]}, "pool", "compact", (Pool(),)),
        (["random:25%,seed=3", "fastervlm:64"], "random+fastervlm", "original", (RANDOM, FASTER)),
    ],
)  # fmt: skip
def test_every_form_loads(given: Any, name: str, positions: str, stages: tuple[Any, ...]) -> None:
    pipeline = config.load(given)
    assert (pipeline.name, pipeline.positions, pipeline.stages) == (name, positions, stages)
    assert config.load(pipeline) is pipeline


def test_a_file_loads_by_path_and_by_text_of_its_path(write: Any) -> None:
    path = write("positions: compact\nstages:\n  - pool\n  - pool:\n  - fastervlm: {keep: 64}\n")
    expected = Pipeline("mine", "compact", (Pool(), Pool(), FASTER))
    assert config.load(path) == config.load(str(path)) == expected


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("stages:\n  - pool\n  - fastervm: {keep: 64}\n", 3, "unknown stage 'fastervm', did you mean 'fastervlm'?"),
        ("stages:\n  - pool\n  - fastervm\n", 3, "unknown stage 'fastervm', did you mean 'fastervlm'?"),
        ("stages:\n  - random:\n      seed: 1\n      kep: 64\n", 4, "'random': unknown option 'kep', did you mean "
                                                                    "'keep'?"),
        ("stages:\n  - random: {seed: 1}\n", 2, "option 'keep' is missing: write a count per image (64), a share (25%)"),
        ("stages:\n  - random:\n      keep: 64\n      seed: yes\n", 4, "'seed': Input should be a valid integer, not "
                                                                       "True"),
        ("stages:\n  - random:\n      keep: 64\n      seed: 1.0\n", 4, "accepted: a whole number"),
        ("stages:\n  - random:\n      seed: 1\n      keep: 0.5\n", 4, "'keep': 0.5 is not a budget; accepted: a count "
                                                                      "per"),
        ("stages:\n  - random:\n      seed: 1\n      keep: 0\n", 4, "keep at least 1 token"),
        ("stages:\n  - random:\n      keep: 200%\n", 3, "at most 100%"),
        ("stages:\n  - random:\n      keep: {totl: 3}\n", 3, "{total: 640}"),
        ("stages:\n  - pool: {size: 0}\n", 2, "accepted: a whole number >= 1"),
        ("stages:\n  - pool: {size: 2001-01-01}\n", 2, "accepted: a whole number >= 1"),
        ("stages:\n  - fastervlm: 64\n", 2, "options of stage 'fastervlm' must be a mapping"),
        ("stages:\n  - pool\n  - fastervlm:\n    keep: 64\n", 3, "indent ['keep'] to make them options"),
        ("stages:\n  - 3\n", 2, "a stage is a name"),
        ("positions: compact\nstage: []\n", 2, "unknown key 'stage', did you mean 'stages'?"),
        ("positions: compact\nfastervlm: {keep: 64}\n", 2, "stages: [fastervlm: ...]"),
        ("stages: []\npositions: kompact\n", 2, "positions must be original or compact, not 'kompact'"),
        ("positions: original\nstages: pool\n", 2, "stages must be a list"),
        ("positions: original\n", 1, "stages must be a list"),
        ("", 1, "a pipeline is a mapping with positions and stages, not None"),
        ("stages: []\npositions: compact\nstages: [pool]\n", 3, "duplicate key 'stages', first on line 1"),
        ("stages:\n  - random:\n      keep: 64\n      keep: 32\n", 4, "duplicate key 'keep', first on line 3"),
        ("stages:\n  - pool\n  - [\n", 4, "not valid YAML"),
        ("stages:\n  - !!python/object/apply:os.getcwd []\n", 2, "is not read here; leave it out"),
        ("stages: []\n---\nstages: []\n", 2, "not valid YAML"),
    ],
)  # fmt: skip
def test_errors_in_a_file_name_the_line(write: Any, text: str, line: int, words: str) -> None:
    path = write(text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("fastervlm65", "unknown preset 'fastervlm65', did you mean 'fastervlm-64'"),
        ("fastervlm65,positions=compact", "unknown preset 'fastervlm65', did you mean 'fastervlm-64'"),
        ("fastervlm-64,", "unknown preset 'fastervlm-64,', did you mean 'fastervlm-64'"),
        ("fastervlm-64,positons=compact", "unknown key 'positons', did you mean 'positions'?"),
        ("fastervlm-64,positions=compact,positions=original", "option 'positions' is given twice"),
        ("fastervlm-64,min_visual_tokens=few", "min_visual_tokens must be a whole number >= 0, not 'few'"),
        ({"preset": "fastervlm64"}, "unknown preset 'fastervlm64', did you mean 'fastervlm-64'"),
        ({"preset": ["pool-2"]}, "unknown preset ['pool-2']"),
        ({"preset": "pool-2", "stages": []}, "the stages are those of the preset 'pool-2'; give one of the two"),
        ("fastervm:64", "as in fastervlm:64"),
        ("no/such/file.yaml", "pipeline file 'no/such/file.yaml' does not exist"),
        (Path("fastervlm-64.yaml"), "did you mean the preset 'fastervlm-64'?"),
        ("fastervlm", "option 'keep' is missing"),
        ("fastervlm:", "option 'keep' is missing"),
        ("pool:64", "unknown option 'keep'. Known: size"),
        ("pool:size=2,size=3", "option 'size' is given twice"),
        ("pool:size=[", "'[' is not a value"),
        ("random:64,seed=1.5", "accepted: a whole number"),
        (3, "not int"),
        (["fastervm:64"], "did you mean 'fastervlm'?"),
        ("snapkv:keep={per_crop: 4}", "per_crop cannot be had in the KV cache; take a count, a share or {total: 640}"),
        ("lookm:important={per_frame: 4}", "per_frame cannot be had in the KV cache; take a count"),
        ("lookm:keep=0", "accepted: a count per image (64), a share (25%)"),
        ("flexprefill:max_budget=512", "max_budget 512 is below min_budget 1024"),
        ([["pool"]], "a stage is a name"),
        ([{"random": {"keep": object()}}], "must be plain data"),
        ([{"random": {("a", 1): 2}}], "must be plain data"),
        ([Late(keep=Budget(4)), FASTER], "'fastervlm' acts at site tokens but comes after 'test_config', which acts "
                                         "at decoder"),
    ],
)  # fmt: skip
def test_errors_without_a_file(given: Any, words: str) -> None:
    assert words in refusal(given)


def test_a_pipeline_built_by_hand_keeps_the_order_too() -> None:
    Pipeline("mine", "original", (FASTER, Late(keep=Budget(4))))
    with pytest.raises(ConfigError, match="order the stages by site"):
        Pipeline("mine", "original", (Late(keep=Budget(4)), FASTER))


def test_a_file_that_is_not_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"stages: [\xff]")
    assert refusal(path) == f"{path} is not UTF-8 text: invalid start byte at byte 9"


def test_aliases_neither_loop_nor_explode(write: Any) -> None:
    assert "inside of what it names" in refusal(write("stages: &a\n  - *a\n"))
    doubling = "".join(f"  - &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert len(refusal(write(f"stages:\n  - &a0 [x]\n{doubling}"))) < 400


@pytest.mark.parametrize("keep", [64, "25%", "33.3%", "0.01%", "0.00001%", {"total": 640}])
@pytest.mark.parametrize("positions", ["original", "compact"])
def test_dump_round_trips(write: Any, keep: Any, positions: str) -> None:
    data = {"positions": positions, "stages": [{"pool": {"size": 3}}, {"random": {"keep": keep, "seed": 7}}]}
    pipeline = config.load(data)
    again = config.load(write(config.dump(pipeline)))
    assert (again.positions, again.stages) == (pipeline.positions, pipeline.stages)
    assert again.stages[1].model_dump()["keep"] == keep


def test_a_preset_with_other_policies(write: Any) -> None:
    base = config.load("hired-next-640")
    short = config.load("hired-next-640,min_visual_tokens=12,positions=original")
    assert short == replace(base, name=short.name, min_visual_tokens=12, positions="original") != base
    assert short.name == "hired-next-640,min_visual_tokens=12,positions=original"
    file = config.load(write("preset: hired-next-640\nnewline: keep\n"))
    assert file == replace(base, name=file.name, newline="keep")
    assert config.load({"preset": "hired-next-640"}) == base
    # YAML that is in a preset's way: a later `preset` does not take its place.
    assert config.load("pool-2,preset=hired-next-640").stages == config.load("pool-2").stages


def test_dump_writes_every_option_in_yaml_that_people_read() -> None:
    assert (
        config.dump(config.load("random:64"))
        == "positions: original\nnewline: keep_if_row_has_token\nanyres: model\nmin_visual_tokens: 0\n"
        "stages:\n- random: {keep: 64, seed: 0}\n"
    )


DOCUMENTS = [
    ("stages: []", True),
    ("stages: [pool]", True),
    ("preset: pool-2", True),
    ("{preset: pool-2, min_visual_tokens: 3}", True),
    ("preset: pool-3", False),
    ("{preset: pool-2, stages: [pool]}", False),
    ("min_visual_tokens: 3", False),
    ("stages: [pool: ]", True),
    ("stages: [pool: {size: 3}, random: {keep: 25%, seed: 3}]", True),
    ("{positions: compact, stages: [fastervlm: {keep: {total: 640}}]}", True),
    ("positions: compact", False),
    ("{positions: kompact, stages: []}", False),
    ("{position: compact, stages: []}", False),
    ("stages: pool", False),
    ("stages: [fastervlm]", False),
    ("stages: [fastervlm: ]", False),
    ("stages: [fastervlm: {keep: 0}]", False),
    ("stages: [fastervlm: {keep: 0.5}]", False),
    ("stages: [fastervlm: {keep: 64, seed: 1}]", False),
    ("stages: [{pool: , random: {keep: 64}}]", False),
    ("stages: [{}]", False),
    ("stages: [nosuch]", False),
    ("stages: [pool: {size: 0}]", False),
]


@pytest.mark.parametrize(("text", "good"), DOCUMENTS)
def test_schema_and_loader_agree(write: Any, text: str, good: bool) -> None:
    try:
        config.load(write(text))
        loads = True
    except ConfigError:
        loads = False
    assert loads == good
    if importlib.util.find_spec("jsonschema"):
        from jsonschema import Draft202012Validator

        assert Draft202012Validator(pipeline_schema()).is_valid(parse(text)[0]) == good


def test_schema_is_whole() -> None:
    schema = pipeline_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    items, bare = schema["properties"]["stages"]["items"]["anyOf"]
    assert sorted(items["properties"]) == registry.stages()
    assert "pool" in bare["enum"] and "fastervlm" not in bare["enum"]
    assert items["properties"]["fastervlm"] == {"$ref": "#/$defs/FasterVLM"}
    random = schema["$defs"]["Random"]
    assert random["title"] == "Random" and "drawn uniformly" in random["description"]
    assert random["properties"]["seed"]["default"] == 0 and random["required"] == ["keep"]
    if importlib.util.find_spec("jsonschema"):
        from jsonschema import Draft202012Validator

        Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("name", registry.presets())
def test_every_preset_builds_and_fits_the_schema(name: str) -> None:
    assert config.load(name).name == name and "min_visual_tokens" not in recipe(name)[0]
    assert summary(name).endswith(".") and "\n" not in summary(name)
    if importlib.util.find_spec("jsonschema"):
        validator().validate(recipe(name)[0])


@cache
def validator():
    from jsonschema import Draft202012Validator

    return Draft202012Validator(pipeline_schema())


@pytest.mark.parametrize(
    "file", sorted({registry.preset_file(name) for name in registry.presets()}), ids=lambda f: f.stem
)
def test_every_preset_file_says_what_its_numbers_mean_and_names_its_variants(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# ") and max(map(len, text.splitlines())) <= 120
    assert sorted(parse(text)[0]["variants"]) == [n for n in registry.presets() if registry.preset_file(n) == file]


SHARED = "positions: compact\nvariants:\n  mine-2:\n    summary: Two.\n    {more}\n    stages: [pool]\n"


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads the preset mine-2 from a file with this text."""
    monkeypatch.setattr(registry, "ROOT", tmp_path)
    monkeypatch.setattr(registry, "stages", lambda: ["pool"])
    monkeypatch.setattr(registry, "stage", lambda name: Pool)
    folder = tmp_path / "presets"
    folder.mkdir()

    def load(text: str) -> Pipeline:
        (folder / "mine.yaml").write_text(text, encoding="utf-8")
        return config.load("mine-2")

    return load


@pytest.mark.parametrize(
    ("more", "newline", "positions"),
    [("newline: drop", "drop", "compact"), ("positions: original", "keep_if_row_has_token", "original")],
)
def test_variants_share_what_stands_beside_them(preset: Any, more: str, newline: str, positions: str) -> None:
    found = preset(SHARED.format(more=more))
    assert found == Pipeline("mine-2", positions, (Pool(),), newline=newline)  # type: ignore[arg-type]
    assert found.written == 'preset "mine-2"' and summary("mine-2") == "Two."


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("variants:\n  mine-2:\n    stages: []\n", 2, "mine-2 must be a mapping with a summary and stages, not "
                                                      "{'stages': []}"),
        ("variants:\n  mine-2:\n", 2, "mine-2 must be a mapping with a summary and stages, not None"),
        (SHARED.format(more="newlin: drop"), 5, "unknown key 'newlin', did you mean 'newline'?"),
        (SHARED.format(more="newline: dro"), 5, "newline must be keep_if_row_has_token, keep or drop, not 'dro'"),
        (SHARED.format(more="").replace("compact", "kompact"), 1, "positions must be original or compact, not "
                                                                  "'kompact'"),
        (SHARED.format(more="").replace("[pool]", "\n      - pool: {size: 0}"), 7, "stage 'pool': option 'size'"),
        (SHARED.format(more="") + "  your-2:\n", 7, "the name 'your-2' must begin with that of its file, mine"),
        ("  mine-2:\n  mine-2:\n", 2, "duplicate key 'mine-2'"),
        ("  mine-2:\n", 1, "variants must be a mapping of names, as in mine-64, to pipelines"),
        ("positions: compact\nvariants: [a]\nx:\n  mine-2:\n", 2, "variants must be a mapping of names"),
    ],
)  # fmt: skip
def test_errors_in_a_preset_name_the_line(preset: Any, tmp_path: Path, text: str, line: int, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        preset(text)
    assert str(caught.value).startswith(f"{tmp_path / 'presets' / 'mine.yaml'}:{line}: ") and words in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["other.yaml", "sub", "static_sparse:gates=gates.json", "[static_sparse: {gates: gates.json}]"],
)
def test_files_that_a_draft_names_stand_beside_the_pipeline_file(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However the draft is written; what does not stand there is looked for in the working directory."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder, layer in ((here, 2), (there, 3)):
        (folder / "sub").mkdir(parents=True)
        (folder / "gates.json").write_text("[[1.0, 0.5]]")
        for file in ("other.yaml", "sub/vtoken.yaml"):
            (folder / file).write_text(f"stages: [fastv: {{layer: {layer}, keep: 4}}]\n")
    (here / "mine.yaml").write_text(f"stages: []\ndraft: {text}\n")
    monkeypatch.chdir(there)

    def named() -> Any:
        draft = config.load("../here/mine.yaml").draft
        assert draft is not None
        stage: Any = draft.stages[0]
        return stage.layer if stage.name == "fastv" else stage.gates

    assert named() in (2, str(here / "gates.json"))
    for file in ("other.yaml", "sub/vtoken.yaml", "gates.json"):
        (here / file).unlink()
    (here / "sub").rmdir()
    assert named() in (3, "gates.json")


def test_drafts_that_name_each_other_are_refused(tmp_path: Path) -> None:
    for name, draft in (("a", "b.yaml"), ("b", "a.yaml"), ("own", "own.yaml")):
        (tmp_path / f"{name}.yaml").write_text(f"stages: []\ndraft: {draft}\n")
    for name in ("a", "own"):
        with pytest.raises(ConfigError, match="the pipeline of a draft has no draft itself"):
            config.load(tmp_path / f"{name}.yaml")
