"""The tables of docs/serving-vllm.md are what `plan` says."""

from __future__ import annotations

from pathlib import Path

import pytest

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
    ("preset", "family", "said"),
    [
        ("fastervlm-64", "llava", "yes"),
        ("fastervlm-64", "llava_next", "`,newline=keep`"),
        ("fastervlm-next-160", "llava_next", "yes"),
        ("fastervlm-next-160", "llava", "cuts pictures, which this family does not"),
        ("random-64", "llava", "`,positions=compact`"),
        ("fastv-64", "llava", "fastv: acts at site decoder"),
        ("flowcut-64", "qwen2_5_vl", "flowcut: acts inside the vision tower"),
    ],
)
def test_answers(served, preset, family, said):
    assert served.answer(preset, family) == said
