"""What `vtoken list --costs` says of a stage."""

from __future__ import annotations

import json
from typing import Any

import pytest

from vtoken import registry
from vtoken.cli import main
from vtoken.commands import list as list_command
from vtoken.evals.cost import decision_costs
from vtoken.evals.cost.geometry import geometry
from vtoken.evals.cost.support_matrix import Cell, SupportMatrix
from vtoken.evals.shared.configs import resolve_config
from vtoken.stages import Fact, Pruner
from vtoken.stages.budget import Budget

NAMES = ("fastervlm", "visionzip", "random")


def answers(**of_random: str) -> SupportMatrix:
    """A matrix made by hand: the real one takes seconds and has its own tests."""
    cells = {name: {"llava": Cell("yes"), "other": Cell("substitute", "Because.")} for name in NAMES}
    cells["random"] = {family: Cell(answer) for family, answer in of_random.items()}  # type: ignore[arg-type]
    return SupportMatrix({"llava": "x/y", "other": "x/z"}, cells)


def rows(**of_random: str) -> dict[str, decision_costs.Cost]:
    return {
        row.stage: row for row in decision_costs.costs([registry.stage(name) for name in NAMES], answers(**of_random))
    }


def test_what_deciding_costs_on_a_picture_of_576_tokens() -> None:
    found = rows(llava="yes", other="yes")
    # One CLS query over 577 keys of 16 heads of 64; one float32 per patch.
    assert found["fastervlm"].flops == 2 * 577 * 1024 and found["fastervlm"].fact_bytes == 576 * 4
    # Besides, the keys of a layer in fp16, and similarities and the mean of 10 tokens at the LLM's width.
    assert found["visionzip"].fact_bytes == 576 * (4 + 2 * 1024 * 2)
    assert found["visionzip"].flops == 2 * 577 * 1024 + 2 * 576 * 11 * 4096 + 10 * 4 * 4096**2
    assert (found["random"].flops, found["random"].fact_bytes) == (0, 0)
    assert found["fastervlm"].families == {"yes": ["llava"], "substitute": ["other"]}


def test_a_stage_that_does_not_run_there_has_no_cost() -> None:
    found = rows(llava="no", other="yes")["random"]
    assert (found.flops, found.fact_bytes) == (None, None)


def test_facts_nobody_knows_have_no_size() -> None:
    shape = geometry(resolve_config(decision_costs.MODEL), None, 1, 1, "model")

    class Odd(Pruner):
        def needs(self) -> tuple[Fact, ...]:
            return (Fact("cls_attention"), Fact("odd"))

    assert decision_costs.fact_bytes(Odd(keep=Budget(64)), shape, 64) is None


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(None, "B", "?"), (0, "", "0"), (999, "B", "999 B"), (1000, "", "1 k"), (3_019_898_880, "", "3.02 G")],
)
def test_numbers_are_short(value: int | None, unit: str, text: str) -> None:
    assert list_command._short(value, unit) == text


def test_the_command_shows_it_in_every_form(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    odd = decision_costs.Cost("random", {"yes": ["llava"], "no": ["other"]}, 1000, None, ("random: the fact odd",))
    monkeypatch.setattr(decision_costs, "costs", lambda stages: [odd])
    assert main(["list", "--costs", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["flops"] == 1000 and found["site"] == "tokens" and found["families"]["no"] == ["other"]
    assert main(["list", "--costs", "--markdown"]) == 0
    out = capsys.readouterr().out
    assert "| random | tokens |  | ? | ≥ 1 k | yes: llava; no: other | no paper |" in out
    assert "Not counted: random: the fact odd." in out
    assert main(["list", "--costs"]) == 0
    assert "≥ 1 k" in capsys.readouterr().out


def test_matrix_and_costs_do_not_go_together(capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["list", "--matrix", "--costs"])
    assert stopped.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
