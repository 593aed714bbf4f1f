"""`draft:` in a pipeline file."""

from __future__ import annotations

import pytest
import tiny

import vtoken
from vtoken.errors import ConfigError, UnsupportedError


def test_the_draft_of_a_pipeline(tmp_path):
    """`draft:` says what `vtoken.draft(model)` makes, in all forms, and travels with the model."""
    model = tiny.make("llava")
    for form in ("specvlm:3", ["specvlm:3"], {"stages": [{"specvlm": {"keep": 3}}]}):
        vtoken.wrap(model, {"draft": form, "stages": ["uniform:8"]})
        own = vtoken.pipeline(model).draft
        assert [stage.name for stage in own.stages] == ["specvlm"]
        assert (
            vtoken.config.load(yaml_file(tmp_path, vtoken.config.dump(vtoken.pipeline(model)))).draft.stages
            == own.stages
        )
        assert vtoken.pipeline(vtoken.draft(model)).stages == own.stages
        assert vtoken.pipeline(model).stages[0].name == "uniform"
        vtoken.unwrap(model)
    vtoken.wrap(model, {"draft": "uniform:3", "stages": []})
    assert vtoken.pipeline(vtoken.draft(model, None, "random:3")).stages[0].name == "random", (
        "what is asked for goes first"
    )
    vtoken.unwrap(model)
    saved = vtoken.save(vtoken.wrap(model, {"draft": "uniform:3", "stages": ["random:9"]}), tmp_path / "saved")
    assert vtoken.config.load(saved).draft.stages[0].keep.tokens == 3


def yaml_file(folder, text):
    file = folder / "vtoken.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("draft: nothing-64\nstages: []\n", "vtoken.yaml:1: draft: unknown preset 'nothing-64'"),
        ("stages: []\ndraft:\n  stages:\n    - uniform: {kep: 3}\n", "vtoken.yaml:4: draft: stage 'uniform'.*kep"),
        ("stages: []\ndraft:\n  draft: none\n  stages: []\n", "vtoken.yaml:2: .* has no draft itself"),
        ("stages: []\ndraft: {stages: [], contrast: {stages: []}}\n", "vtoken.yaml:2: .* has no contrast"),
        ("stages: []\ndraft: damro-10\n", "vtoken.yaml:2: .* has no contrast"),
        ("stages: []\ndraft: 7\n", "vtoken.yaml:2: draft: a pipeline is"),
    ],
)
def test_drafts_that_do_not_read(text, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        vtoken.config.load(yaml_file(tmp_path, text))


def test_a_draft_s_answers_are_compared_with_nothing():
    model = vtoken.wrap(tiny.llava(), "random:9")
    with pytest.raises(UnsupportedError, match="can have no contrast"):
        vtoken.draft(model, None, "damro-10")
    assert vtoken.pipeline(model).stages[0].name == "random", "as before"
