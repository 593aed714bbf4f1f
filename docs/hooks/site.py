"""What `make docs` adds to the pages of docs/: a page per method, facts, costs, presets, notebooks, and pages that live
elsewhere in the repository."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import generated  # noqa: E402  # mkdocs puts the hook's folder on the path.
import links  # noqa: E402
import notebook  # noqa: E402


def on_config(config: Any) -> Any:
    """The pages of the methods join the navigation, by site."""
    for entry in config.nav:
        if isinstance(entry, dict) and "Methods" in entry:
            entry["Methods"] += [{f"Site {site}": pages} for site, pages in generated.by_site().items()]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages."""
    pages: dict[str, str | bytes] = generated.everything()
    pages |= {page: (ROOT / file).read_text(encoding="utf-8") for page, file in links.BORROWED.items()}
    for file in sorted((ROOT / "docs" / "notebooks").glob("*.ipynb")):
        pages |= notebook.pages(file)
    for place, content in pages.items():
        files.append(File.generated(config, place, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    place = page.file.src_uri
    if place in ("methods.md", "families.md"):
        markdown = links.to_methods(markdown, generated.stages())
    return links.for_the_site(markdown, place)


def on_post_build(config: Any) -> None:
    print(f"open {os.path.relpath(config.site_dir)}/index.html")
