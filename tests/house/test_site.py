"""What `make docs` makes of the code: a page per method, rows of RESULTS.md, links, notebooks. mkdocs itself is not asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
HOOKS = ROOT / "docs" / "hooks"


@pytest.fixture
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The hooks' modules, for two stages and without pictures, which take seconds."""
    monkeypatch.syspath_prepend(str(HOOKS))
    import generated
    import links
    import measured
    import notebook

    from vtoken import registry

    chosen = {name: registry.stage(name) for name in ("visionzip", "dyvte")}
    monkeypatch.setattr(generated, "classes", lambda: chosen)
    monkeypatch.setattr(generated, "pictures", lambda: ("what?", {"all": (576, b""), "visionzip": (32, b"JPEG")}))
    yield type("Hooks", (), {m.__name__: staticmethod(m) for m in (generated, links, measured, notebook)})
    for each in (generated.matrix, generated.cost):
        each.cache_clear()
    for name in ("generated", "links", "measured", "notebook"):
        sys.modules.pop(name)


def test_every_option_of_every_stage_is_described() -> None:
    from vtoken import registry

    for name in registry.stages():
        fields = registry.stage(name).model_fields
        assert not [key for key, field in fields.items() if not field.description], name


def test_the_page_of_a_method_tells_all_there_is(hooks: Any) -> None:
    page = hooks.generated.method("visionzip")
    assert page.startswith("# visionzip\n\nVisionZip: keep what the CLS token attends to")
    for title in ("What it computes", "Options", "Use", "Presets", "Families", "Cost of deciding", "Measured"):
        assert f"\n## {title}\n" in page, title
    assert "](../pictures/kept/visionzip.jpg)" in page and "32 of 576 tokens" in page
    assert "| `keep` | required |" in page and "| `heads` | `null` |" in page
    assert "| `visionzip-next-640` | compact |" in page
    assert "| [qwen2_vl](../families/qwen2_vl.md) | substitute |" in page
    assert "724 M FLOPs, 2.36 MB of facts" in page
    assert f"| visionzip:64 | {hooks.generated.operations.PIPELINES['visionzip:64'][1]} |" in page
    assert "| visionzip | 98.9 · 97.3 · 88.3 | 100.5 · 95.7 · 84.9 | 98.4 · 94.1 · 86.2 |" in page
    assert "The CLS token, which the authors count as one dominant token" in page


def test_a_method_that_needs_a_file_is_shown_so(hooks: Any) -> None:
    page = hooks.generated.method("dyvte")
    assert 'vtoken.wrap(model, [{"dyvte": {"gates": ...}}])' in page and "](../pictures/kept" not in page
    assert "| dyvte-tiny-llava | 492 | 97.9 (95.8–99.5) | 0.91 |" in page  # by its preset
    assert "| dyvte, shipped gates | 496 | 96.6 % |" in page


def test_pages_and_tables_name_every_stage(hooks: Any) -> None:
    made = hooks.generated.everything()
    assert {"methods/visionzip.md", "methods/dyvte.md", "facts.md", "costs.md", "presets.md"} <= {*made}
    assert made["pictures/kept/visionzip.jpg"] == b"JPEG"
    assert "| `received_attention` | encoder, tokens, decoder |" in made["facts.md"]
    assert "| [visionzip](methods/visionzip.md) | tokens | 2.36 MB | 724 M |" in made["costs.md"]
    assert "| `none` | none |" in made["presets.md"] and "| `vscan-96` | [vscan]" in made["presets.md"]
    assert hooks.generated.by_site()["decoder"] == ["methods/dyvte.md"]


def test_rows_of_another_method_stay_out(hooks: Any) -> None:
    (found,) = [text for text in hooks.measured.rows_of({"flowcut"}) if "acts inside the decoder" in text][:1]
    assert "| flowcut, flowcut_late:515 |" in found and "fastv" not in found.partition("\n\n")[2]
    assert not any("flowcut_late:64" in text for text in hooks.measured.rows_of({"flowcut"}))
    assert not hooks.measured.rows_of({"static_sparse"})
    assert hooks.measured.published("visionzip") and not hooks.measured.published("textmonkey")


@pytest.mark.parametrize(
    ("place", "text", "expected"),
    [
        ("index.md", "[c](concepts.md#facts)", "[c](concepts.md#facts)"),
        ("index.md", "[r](../benchmarks/RESULTS.md)", "[r](results.md)"),
        ("families/llava.md", "[c](../concepts.md)", "[c](../concepts.md)"),
        ("results.md", "[m](../docs/methods.md#x)", "[m](methods.md#x)"),
        ("models.md", "[t](tiny-llava-next/README.md)", "[t](models/tiny-llava-next.md)"),
        ("index.md", "[n](notebooks/prune_your_vlm.ipynb)", "[n](notebooks/prune_your_vlm.md)"),
        ("concepts.md", "[`f`](../vtoken/stages/facts.py#L1)", "[`f`](facts.md)"),
        ("index.md", "[s](../vtoken/session.py)", "s"),
        ("index.md", "[s](../vtoken/nowhere.py)", "[s](../vtoken/nowhere.py)"),
        ("index.md", "[h](https://x.org/a.md) [a](#b)", "[h](https://x.org/a.md) [a](#b)"),
        ("index.md", "```\n[s](../vtoken/session.py)\n```", "```\n[s](../vtoken/session.py)\n```"),
    ],
)
def test_links_are_changed_for_the_site(hooks: Any, place: str, text: str, expected: str) -> None:
    assert hooks.links.for_the_site(text, place) == expected


def test_tables_link_to_the_pages_of_methods(hooks: Any) -> None:
    table = "| stage |\n| fastv | x |\n| fastv_late | x |"
    assert (
        hooks.links.to_methods(table, ["fastv"]) == "| stage |\n| [fastv](methods/fastv.md) | x |\n| fastv_late | x |"
    )


def test_a_docstring_is_no_html_and_no_emphasis(hooks: Any) -> None:
    made = hooks.generated.prose("<R> of a*b, `x<y*z`, see https://x.org/1.")
    assert made == "&lt;R> of a\\*b, `x<y*z`, see <https://x.org/1>."


def test_a_notebook_becomes_a_page_with_what_it_drew(hooks: Any, tmp_path: Path) -> None:
    outputs = [{"data": {"image/png": "cGljdHVyZQ=="}}, {"text": ["32 tokens\n"]}]
    cells = [
        {"cell_type": "markdown", "source": ["# Title\n", "words"]},
        {"cell_type": "code", "source": "ask()", "outputs": outputs},
    ]
    file = tmp_path / "small.ipynb"
    file.write_text(json.dumps({"cells": cells}))
    made = hooks.notebook.pages(file)
    assert made["notebooks/small-0.png"] == b"picture"
    page = made["notebooks/small.md"]
    assert page.startswith("# Title\nwords\n\n```python\nask()\n```\n\n![](small-0.png)\n\n```text\n32 tokens\n```")


def test_every_page_has_its_place_in_the_navigation() -> None:
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    listed = json.dumps(nav)
    pages = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.md")]
    assert len(pages) > 15 and not [page for page in pages if f'"{page}"' not in listed]
