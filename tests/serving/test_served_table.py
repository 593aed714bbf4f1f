"""The tables of docs/serving-vllm.md are what `plan` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from vtoken.serving import plan

HOOKS = Path(__file__).parents[2] / "docs" / "hooks"


@pytest.fixture
def served(monkeypatch):
    monkeypatch.syspath_prepend(str(HOOKS))
    import served

    return served


def test_the_tables_are_the_generated_ones(served):
    page = served.PAGE.read_text(encoding="utf-8")
    assert all(f"<!-- {name} -->\n|" in page for name in served.TABLES)
    assert served.written(page) == page, "run `python docs/hooks/served.py`"


@pytest.mark.parametrize(
    ("preset", "crops", "said"),
    [
        ("fastervlm-64", False, "yes"),
        ("fastervlm-64", True, "`,newline=keep`"),
        ("fastervlm-next-160", True, "yes"),
        ("fastervlm-next-160", False, "cuts pictures, which this family does not"),
        ("random-64", False, "`,positions=compact`"),
        ("fastv-64", False, "fastv: acts at site decoder"),
        ("flowcut-64", True, "flowcut: acts inside the vision tower"),
    ],
)
def test_answers(served, preset, crops, said):
    families = [name for name, held in plan.FAMILIES.items() if held.positions == "compact" and held.crops == crops]
    assert families and {served.answer(preset, family) for family in families} == {said}
