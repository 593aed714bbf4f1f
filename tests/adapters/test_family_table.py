"""docs/families/README.md says of every family what its adapter finds."""

from __future__ import annotations

from pathlib import Path

import tiny

from vtoken import registry

PAGE = Path(__file__).parents[2] / "docs" / "families" / "README.md"


def test_the_table_says_what_adapters_find() -> None:
    lines = [
        line.strip("| ").split(" | ") for line in PAGE.read_text(encoding="utf-8").splitlines() if ".md) | `" in line
    ]
    told = {row[1].strip("`"): row for row in lines}
    assert sorted(told) == registry.adapters()
    for family, (_, _, _, _, cls, video, *_) in told.items():
        adapter = tiny.adapter(tiny.make(family))
        assert (cls, video) == tuple(
            "yes" if has else "no" for has in (adapter.encoder.cls, "video" in adapter.features)
        )
        joined = "1" if tiny.family(family).unit == 1 else told[family][3]
        assert (told[family][3] == "1") == (adapter.encoder.unit == 1) and joined.isdecimal()


def test_the_refused_are_named() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"`{family}`" in page for family in registry.REFUSED)
