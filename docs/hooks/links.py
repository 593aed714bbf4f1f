"""Links between pages are written for the repository; here they are changed for the site."""

from __future__ import annotations

import re
from pathlib import Path
from posixpath import dirname, join, normpath, relpath

ROOT = Path(__file__).parents[2]
# Place in the repository -> place on the site.
ELSEWHERE = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "benchmarks/RESULTS.md": "results.md",
    "reference_models/README.md": "models.md",
    "vtoken/evals/reference/tiny-llava/README.md": "models/tiny-llava.md",
    "reference_models/tiny-llava-next/README.md": "models/tiny-llava-next.md",
    "reference_models/tiny-qwen2.5-vl/README.md": "models/tiny-qwen2.5-vl.md",
    "vtoken/hooks/README.md": "hooks.md",
    "vtoken/stages/facts.py": "facts.md",
}
# Pages of the site that are files of the repository outside docs/ -> the file.
BORROWED = {page: file for file, page in ELSEWHERE.items() if file.endswith(".md") and file != "README.md"}
LINK = re.compile(r"(!?)\[([^\[\]]*)\]\((?!\w+:|#|<)([^)\s#]+)(#[^)\s]*)?\)")


def for_the_site(markdown: str, place: str) -> str:
    """The text of a page with its links changed: to files that are pages of the site they lead there, other files of the
    repository lose their link, code is left alone."""
    folder = dirname(BORROWED.get(place, join("docs", place)))

    def turned(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        goal = normpath(join(folder, target))
        if goal.endswith(".ipynb"):
            goal = f"{goal.removesuffix('.ipynb')}.md"
        there = ELSEWHERE.get(goal) or (goal.removeprefix("docs/") if goal.startswith("docs/") else None)
        if there is None:
            return label if (ROOT / goal).exists() else match[0]
        return f"{image}[{label}]({relpath(there, dirname(place) or '.')}{'' if goal.endswith('.py') else anchor})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if k % 2 else LINK.sub(turned, part) for k, part in enumerate(parts))


def to_methods(markdown: str, stages: list[str]) -> str:
    """A table whose rows begin with a stage's name, with links to its page."""
    for stage in stages:
        markdown = re.sub(rf"^\| {stage} \|", f"| [{stage}](methods/{stage}.md) |", markdown, flags=re.MULTILINE)
    return markdown
