"""`vtoken list --matrix`: what it says of a family is what `wrap` does on a real model of that family."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from modes import VERSION
from packaging.version import Version
from tiny import FAMILIES, build, each, make
from usual import of_a_draft

import vtoken
from vtoken import registry
from vtoken.cli import main
from vtoken.errors import OtherModelError, UnsupportedError
from vtoken.evals.cost import support_matrix as matrices
from vtoken.stages import Fact, Pruner, Site
from vtoken.stages.budget import Budget

ROOT = Path(__file__).parents[3]


@cache
def whole() -> matrices.SupportMatrix:
    return matrices.support_matrix([registry.stage(name) for name in registry.stages()])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", registry.stages())
def test_the_matrix_is_what_wrap_does(family: str, name: str) -> None:
    stage = matrices.example_stage(registry.stage(name))
    if stage is None:  # thresholds of a checkpoint, the name of a press
        fields = registry.stage(name).model_fields
        assert {field for field, about in fields.items() if about.is_required()} - {"keep"}
        assert whole().cells[name][family].answer == "depends"
        return
    model = make(family)
    direct = matrices.cell(model, stage, registry.adapter(family)(model).substitutes)
    try:
        if of_a_draft(name):
            vtoken.draft(model, None, stage)
        else:
            vtoken.wrap(model, stage)
    except OtherModelError:
        assert direct.answer == "depends" and "made for the model" in direct.reason
    except UnsupportedError as error:
        assert direct.answer == "no" and str(error).rstrip(".") in direct.reason
    else:
        with torch.no_grad():
            model(**build(model, [[3, "img", 5]]))
        given = {k: v for each in vtoken.trace(model).stages for k, v in each.substitutes.items()}
        assert direct.answer == ("substitute" if given else "yes")
        assert all(f"{new} stands in for {old}" in direct.reason for old, new in given.items())
    # The matrix asks a model of full depth, which has other layers.
    found = whole().cells[name][family]
    assert found.answer == direct.answer or any(
        why in found.reason + direct.reason for why in ("layer", "made for the model")
    )


def test_every_family_and_stage_is_there() -> None:
    assert list(whole().models) == registry.adapters() and list(whole().cells) == registry.stages()
    answers = {family: whole().cells["fastervlm"][family].answer for family in FAMILIES}
    assert answers["llava"] == "yes" and answers["qwen2_vl"] == "substitute"


class Odd(Pruner):
    """Asks for a fact that no encoder has."""

    name: ClassVar[str] = "odd"
    site: ClassVar[Site] = "tokens"

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("last_query_attention"),)


class Windowed(Pruner):
    """Asks for attention of a block that has windows in Qwen2.5-VL."""

    name: ClassVar[str] = "windowed"

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("received_attention", 0),)


class Open(Pruner):
    """Has an option that nobody can guess."""

    name: ClassVar[str] = "open"

    depth: int


def test_a_refusal_is_told_with_its_reason_once() -> None:
    plain, windowed, *_ = each("full_attention")
    found = matrices.support_matrix([Odd, Windowed], [plain, windowed])
    assert {c.answer for c in found.cells["odd"].values()} == {"no"}
    assert found.cells["windowed"][plain].answer == "yes" and found.cells["windowed"][windowed].answer == "no"
    assert len(found.notes()) == 2
    assert "needs last_query_attention" in found.notes()[0] and "within windows only" in found.notes()[1]


def test_a_stage_with_an_option_without_default_is_not_guessed() -> None:
    assert matrices.example_stage(Open) is None
    assert matrices.cell(None, None, {}).answer == "depends"
    assert matrices.example_stage(registry.stage("random")).keep == Budget(64)


def shown(*words: str, capsys: Any) -> str:
    assert main(["list", "--matrix", *words]) == 0
    return capsys.readouterr().out


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command computes it anew; the same object is used for speed."""
    found = whole()
    monkeypatch.setattr(matrices, "support_matrix", lambda stages: found)


def test_as_json(known: None, capsys: Any) -> None:
    found = json.loads(shown("--json", capsys=capsys))
    assert found == whole().to_dict()
    assert found["cells"]["fastervlm"]["llava"] == {"answer": "yes", "reason": None}


def test_as_a_table(known: None, capsys: Any) -> None:
    out = shown(capsys=capsys)
    assert all(f" {name} " in out for name in registry.stages())
    assert re.search(r"^\d+\. received_attention stands in for cls_attention", out, re.MULTILINE)


@pytest.mark.skipif(VERSION < Version("5.18"), reason="the page is that of a later transformers, which refuses less")
def test_the_matrix_of_the_docs_is_the_generated_one(known: None, capsys: Any) -> None:
    page = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- matrix -->\n(.*?)<!-- /matrix -->", page, re.DOTALL)
    assert match, "docs/families.md needs the markers <!-- matrix --> and <!-- /matrix -->"
    assert match[1].strip() == shown("--markdown", capsys=capsys).strip(), (
        "paste the output of `vtoken list --matrix --markdown`"
    )


def test_the_command_calls_the_matrix(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    seen: list[list[str]] = []

    def record(stages: list[Any]) -> matrices.SupportMatrix:
        seen.append([cls.name for cls in stages])
        return matrices.SupportMatrix({"llava": "x/y"}, {"odd": {"llava": matrices.Cell("no", "Because.")}})

    monkeypatch.setattr(matrices, "support_matrix", record)
    assert "| odd | no [1] |" in shown("--markdown", capsys=capsys)
    assert seen == [registry.stages()]
