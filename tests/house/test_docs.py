"""The pages of docs: one per adapter, with pipelines that read and an example that runs; their tables and links."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image
from tiny import make
from tiny_processors import processor

import vtoken
from vtoken import config, registry
from vtoken.cli import main

ROOT = Path(__file__).parents[2]
METHODS = ROOT / "docs" / "methods.md"
PAGES = sorted((ROOT / "docs" / "families").glob("[!R]*.md"))
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)


def test_every_adapter_has_a_page_and_the_readme_links_it() -> None:
    assert [page.stem for page in PAGES] == registry.adapters()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert all(f"(docs/families/{page.name})" in readme for page in PAGES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pipelines_of_the_page_read(page: Path) -> None:
    pipelines = blocks(page, "yaml")
    assert pipelines
    for text in pipelines:
        assert config.load(yaml.safe_load(text)).stages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_example_of_the_page_runs(page: Path, monkeypatch: Any, capsys: Any) -> None:
    """With a tiny model of the family in place of the checkpoint."""
    (code,) = blocks(page, "python")
    model = make(page.stem)
    name = re.search(r'name = "(.*)"', code)
    assert name and f"`model_type: {page.stem}`" in page.read_text(encoding="utf-8")

    def given(what: Any) -> Any:
        return staticmethod(lambda asked, **options: what if asked == name[1] else pytest.fail(asked))

    monkeypatch.setattr(transformers.AutoModelForImageTextToText, "from_pretrained", given(model))
    monkeypatch.setattr(transformers.AutoProcessor, "from_pretrained", given(processor(page.stem)))
    monkeypatch.setattr(Image, "open", lambda path: Image.new("RGB", (100, 60), "red"))
    exec(compile(code, str(page), "exec"), {})
    kept = vtoken.trace(model)
    assert kept.stages and capsys.readouterr().out.endswith(f"{kept.tokens_out}\n")
    vtoken.unwrap(model)


def test_the_table_of_the_methods_is_the_generated_one(capsys: Any) -> None:
    match = re.search(r"<!-- methods -->\n(.*?)<!-- /methods -->", METHODS.read_text(encoding="utf-8"), re.DOTALL)
    assert match, "docs/methods.md needs the markers <!-- methods --> and <!-- /methods -->"
    assert main(["list", "--markdown", "short"]) == 0
    assert match[1].strip() == capsys.readouterr().out.strip(), "paste the output of `vtoken list --markdown short`"


def test_published_figures_are_of_stages_there_are() -> None:
    section = (ROOT / "docs" / "accuracy.md").read_text(encoding="utf-8").partition("\n## Published\n")[2]
    named = re.findall(r"^\| (\w+)", section, re.MULTILINE)
    assert {*named} - {"stage"} <= {*registry.stages()} and "visionzip" in named


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"(?:\]\(|src=\")(?!http|#)([^\s)\"]+)[)\"]", page.read_text(encoding="utf-8")):
        assert (page.parent / target.partition("#")[0]).is_file(), target
