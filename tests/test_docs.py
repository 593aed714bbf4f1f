"""The pages of docs/families: one per adapter, with pipelines that read and an example that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from PIL import Image
from tiny_models import make
from tiny_processors import processor

import vtoken
from vtoken import config, registry

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "families").glob("*.md"))


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!http)(\S+?)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).is_file()
