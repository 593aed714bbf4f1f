"""The tables of docs/serving-vllm.md: which presets and stages vLLM serves on which family, and why not, asked of
`vtoken.serving.plan`. Run it to write them into the page."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache
from itertools import groupby
from pathlib import Path

from vtoken import config, registry
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError, VtokenError
from vtoken.evals.shared.tables import markdown
from vtoken.serving import plan
from vtoken.stages import Stage

PAGE = Path(__file__).parents[1] / "serving-vllm.md"
TITLES = {family: f"[{family}](families/{family}.md)" for family in plan.FAMILIES}


def stages() -> str:
    """A row per stage that is served somewhere."""
    rows = [["stage", "site", *TITLES.values()]]
    for name in registry.stages():
        if not registry.is_built_in(name):
            continue
        try:
            (stage,) = config.load(f"{name}:64" if "keep" in registry.stage(name).model_fields else name).stages
        except VtokenError:
            continue  # one that needs a file or a number
        cells = [_why(stage, family) for family in plan.FAMILIES]
        if stage.site in ("tokens", "encoder"):
            rows.append([name, stage.site, *cells])
    return markdown(rows)


def presets() -> str:
    """A row per method and answer, of presets that some family serves."""
    return markdown([["presets", *TITLES.values()], *([name, *cells] for name, cells in _answers() if _served(cells))])


def refused() -> str:
    """A row per method, of presets that no family serves."""
    rows = [[name, "; ".join(dict.fromkeys(cells))] for name, cells in _answers() if not _served(cells)]
    return markdown([["presets", "why"], *rows])


@cache
def _answers() -> list[tuple[str, tuple[str, ...]]]:
    """Presets of one method and one answer per family, and that."""
    names = [name for name in registry.presets() if config.load(name).stages]
    found = [(name.partition("-")[0], tuple(answer(name, family) for family in plan.FAMILIES), name) for name in names]
    rows = []
    for (method, cells), some in groupby(sorted(found), key=lambda row: row[:2]):
        ends = [name.removeprefix(method) for *_, name in some]
        rows.append((", ".join([f"`{method}{ends[0]}`", *(f"`{end}`" for end in ends[1:])]), cells))
    return rows


def _served(cells: tuple[str, ...]) -> bool:
    return any(cell == "yes" or cell.startswith("`,") for cell in cells)


def answer(preset: str, family: str) -> str:
    """ "yes", the policies to write behind the preset's name, or why not."""
    pipeline = config.load(preset)
    if _passes(pipeline, family):
        return "yes"
    policies = {"positions": plan.FAMILIES[family].positions}
    if plan.FAMILIES[family].newlines and pipeline.newline == "keep_if_row_has_token":
        policies["newline"] = "keep"
    if _passes(replace(pipeline, **policies), family):
        told = [f"{key}={value}" for key, value in policies.items() if getattr(pipeline, key) != value]
        return f"`,{','.join(told)}`"
    for k, stage in enumerate(pipeline.stages):
        if why := _why(stage, family, pipeline.stages[:k]).removeprefix("yes"):
            return f"{stage.name}: {why}"
    return "cuts pictures, which this family does not"


def _passes(pipeline: Pipeline, family: str) -> bool:
    try:
        plan.check(pipeline, family)
    except UnsupportedError:
        return False
    return True


def _why(stage: Stage, family: str, before: tuple[Stage, ...] = ()) -> str:
    why = plan.refusal(stage, family, before)
    return re.split(r"[;,]", why)[0].removeprefix("it ") if why else "yes"


TABLES = {"stages": stages, "presets": presets, "refused": refused}


def written(page: str) -> str:
    """The page with its tables made anew."""
    for name, table in TABLES.items():
        marked = f"<!-- {name} -->\n{table()}\n<!-- /{name} -->"
        page = re.sub(rf"<!-- {name} -->\n.*?<!-- /{name} -->", lambda _, to=marked: to, page, flags=re.DOTALL)
    return page


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
