"""A family is found by its files: no test and no part of vtoken but these lists families, or asks for one by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from vtoken import registry

ROOT = Path(__file__).parents[2]
FAMILIES = {*registry.adapters()}
# A folder, or a file of it per family. What is truly about one family may name it there.
OWN = [ROOT / "tests" / "adapters", ROOT / "tests" / "support" / "families", ROOT / "vtoken" / "adapters"]
FILES = [
    file
    for folder in ("tests", "vtoken")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if not any(file.is_relative_to(own) for own in OWN) and file.stem not in FAMILIES
]


def named(node: ast.AST) -> set[str]:
    """Families whose names stand somewhere in a piece of code."""
    return {n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)} & FAMILIES


def found(source: str) -> Iterator[tuple[int, str]]:
    """Literals that name two families or more, and questions for one by its name or how that begins."""
    for node in ast.walk(ast.parse(source)):
        wrong = False
        if isinstance(node, (ast.List, ast.Tuple, ast.Set, ast.Dict)):
            wrong = len(named(node)) > 1
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            wrong = any(
                isinstance(side, ast.Constant) and side.value in FAMILIES for side in (node.left, *node.comparators)
            )
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "startswith":
            starts = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            wrong = any(start and family.startswith(start) for start in starts for family in FAMILIES)
        if wrong:
            yield node.lineno, ast.unparse(node)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_lists_families(file: Path) -> None:
    assert not list(found(file.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "line",
    [
        "SOME = ('llava', 'qwen2_vl')",
        "{'llava': 1, 'qwen3_vl': 2}",
        "f([('llava', 1), ('llava_next', 2)])",
        "if family != 'llava': pass",
        "x = name.startswith('qwen')",
    ],
)
def test_the_rule_sees(line: str) -> None:
    assert list(found(line))
