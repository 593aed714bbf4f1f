"""Pages that follow from the code: one per method, its facts, costs and presets. Numbers come from the FLOPs account, from
benchmarks/operations.py and from the tables of benchmarks/RESULTS.md; nothing is measured here but what a method keeps of
one picture."""

from __future__ import annotations

import inspect
import io
import json
import re
from functools import cache
from typing import Any

from measured import published, rows_of

from benchmarks import kept, operations
from vtoken import config, registry
from vtoken.commands.list import describe
from vtoken.commands.list import presets as all_presets
from vtoken.evals.cost.decision_costs import Cost, costs
from vtoken.evals.cost.support_matrix import SupportMatrix, support_matrix
from vtoken.evals.shared.tables import markdown, scaled
from vtoken.stages import FACTS, SITES

KEEP, CELL = 32, 14  # tokens, and pixels of a token, of the pictures
MODEL = "tiny-llava"
DENSE = "The dense prefill of the same prompt is 8.91 TFLOPs, so 1 GFLOP is 0.011 % of it."
ABOUT_COSTS = f"""One picture of LLaVA-1.5-7B: 576 visual tokens, 64 text tokens, default options, `keep: 64`, by the account of `vtoken flops`.
{DENSE} FLOPs: facts and decision together. Bytes: of the facts that the stage is given (attention and means float32, the rest 2 bytes a
number; a stage that acts in several layers: in the first), not of what computing them needs. "?": options without a default, or
defaults that do not run on this model."""
ABOUT_OPERATIONS = """Operations that torch dispatches in a prefill besides those of the stock model, views left out: what a host has
to launch. A tower of 24 layers and a decoder of 4, one picture of 576 tokens, on a CPU; counts, not times. `benchmarks/operations.py`,
2026-11-30, torch 2.13.0, transformers 5.23.0."""


@cache
def classes() -> dict[str, Any]:
    usable, broken = registry.catalogue()
    assert not broken, broken
    return {name: cls for name, cls in usable.items() if registry.is_built_in(name)}


@cache
def matrix() -> SupportMatrix:
    return support_matrix([*classes().values()])


@cache
def cost() -> dict[str, Cost]:
    return {row.stage: row for row in costs([*classes().values()], matrix())}


@cache
def pictures() -> tuple[str, dict[str, tuple[int, bytes]]]:
    """The question, and what every method keeps of its picture: tokens and a JPEG."""
    question, tiles = kept.kept(MODEL, KEEP, CELL)
    found = {}
    for tile in tiles:
        file = io.BytesIO()
        tile.picture.save(file, "JPEG", quality=82, optimize=True)
        found[tile.method] = tile.tokens, file.getvalue()
    return question.question, found


def stages() -> list[str]:
    return [*classes()]


def by_site() -> dict[str, list[str]]:
    """Site -> pages of its methods."""
    return {site: [f"methods/{name}.md" for name, cls in classes().items() if cls.site == site] for site in SITES}


def everything() -> dict[str, str | bytes]:
    """Place on the site -> what is there."""
    found: dict[str, str | bytes] = {f"methods/{name}.md": method(name) for name in classes()}
    found |= {f"pictures/kept/{name}.jpg": data for name, (_, data) in pictures()[1].items()}
    return found | {"facts.md": facts(), "costs.md": cost_table(), "presets.md": preset_table()}


def method(name: str) -> str:
    """The page of a stage."""
    cls = classes()[name]
    about = describe(cls)
    parts = [f"# {name}", about["summary"], _head(name, about), _picture(name)]
    parts += [
        "## What it computes",
        prose(inspect.getdoc(cls) or ""),
        "## Options",
        _options(cls),
        "## Use",
        _use(name),
    ]
    parts += ["## Presets", _presets(name), "## Families", _families(name), "## Cost of deciding", _cost(name)]
    parts += ["## Measured", _measured(name), "## Deviations from the authors' code"]
    parts += [
        prose(cls.deviations) or "None is known."
        if cls.paper != "no paper"
        else "There are no authors' results to compare with."
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(name: str, about: dict[str, Any]) -> str:
    paper = about["paper"]
    needs = ", ".join(f"`{fact}`" for fact in about["needs"]) or "none"
    linked = f"[{paper.rpartition('/')[2]}]({paper})" if paper.startswith("https://") else "none"
    return (
        f"{about['kind'].capitalize()}, site {about['site']}. [Facts](../facts.md) it reads: {needs}. Paper: {linked}."
    )


def _picture(name: str) -> str:
    question, found = pictures()
    if name not in found:
        return ""
    tokens, _ = found[name]
    told = (
        f"What it leaves of the first shipped picture, asked “{question}”: {tokens} of {found['all'][0]} tokens, on "
        f"{MODEL}, options as in [methods](../methods.md#what-each-keeps-of-one-picture). Dropped cells are grey, merged "
        "cells have the tint of the token that took them."
    )
    return f"![Kept tokens of {name}: {tokens}](../pictures/kept/{name}.jpg){{ width=336 }}\n\n{told}"


def _options(cls: Any) -> str:
    if not cls.model_fields:
        return "It has none."
    defaults = describe(cls)["options"]
    rows = [["option", "default", "meaning"]]
    for key, field in cls.model_fields.items():
        default = "required" if defaults[key]["required"] else f"`{json.dumps(defaults[key]['default'])}`"
        rows.append([f"`{key}`", default, _cell(prose(_meaning(field)))])
    return markdown(rows)


def _meaning(field: Any) -> str:
    signs = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    limits = [f"{words} {getattr(m, s)}" for m in field.metadata for s, words in signs.items() if hasattr(m, s)]
    return f"{field.description} ({', '.join(limits)})" if limits else field.description


def _use(name: str) -> str:
    preset = next((p["preset"] for p in _presets_of(name)), None)
    cls = classes()[name]
    required = [key for key, field in cls.model_fields.items() if field.is_required()]
    if "target_attention" in describe(cls)["needs"]:
        return f'```python\nassistant = vtoken.draft(model, draft, "{preset}")\n```\n\nSee [drafts](../drafts.md).'
    if set(required) <= {"keep"}:
        budget = ":64" if required else ""
        lines = [f'vtoken.wrap(model, "{name}{budget}")  # the bare stage, with its defaults']
    else:
        options = ", ".join(f'"{key}": ...' for key in required)
        lines = [f'vtoken.wrap(model, [{{"{name}": {{{options}}}}}])']
    lines += [f'vtoken.wrap(model, "{preset}")  # a preset'] if preset else []
    return "```python\n" + "\n".join(lines) + "\n```"


@cache
def _every_preset() -> tuple[dict[str, Any], ...]:
    return tuple(all_presets())


def _presets_of(name: str) -> list[dict[str, Any]]:
    return [row for row in _every_preset() if any(name in stage for stage in row["stages"])]


def _presets(name: str) -> str:
    found = _presets_of(name)
    if not found:
        return "There is none."
    return markdown(
        [
            ["preset", "positions", "token counts", "what it is"],
            *([f"`{p['preset']}`", p["positions"], _counts(p["preset"]), _cell(prose(p["summary"]))] for p in found),
        ]
    )


def _counts(preset: str) -> str:
    """Whether a picture's size tells how many of its tokens stay."""
    return "exact" if all(s.counts_are_exact() for s in config.load(preset).stages) else "expected"


def _families(name: str) -> str:
    row = matrix().cells[name]
    if {cell.answer for cell in row.values()} == {"yes"}:
        return f"It runs on all: {', '.join(_family(family) for family in row)}."
    cells = ([_family(family), cell.answer, _cell(prose(cell.reason or ""))] for family, cell in row.items())
    return markdown([["family", "runs", "why"], *cells])


def _family(name: str) -> str:
    return f"[{name}](../families/{name}.md)"


def _cost(name: str) -> str:
    row = cost()[name]
    flops, size = _scaled(row.flops, ""), _scaled(row.fact_bytes, "B")
    told = f"{'≥ ' if row.left_out else ''}{flops} FLOPs, {size} of facts, on one picture of LLaVA-1.5-7B ([conditions](../costs.md))."
    told += "".join(f" Not counted: {sentence}." for sentence in row.left_out)
    counted = [
        [label, str(most)] for label, (pipeline, most, _) in operations.PIPELINES.items() if name in _names(pipeline)
    ]
    if not counted:
        return told
    return f"{told}\n\n{markdown([['pipeline', 'operations besides those of the stock model'], *counted])}\n\n{ABOUT_OPERATIONS}"


def _names(pipeline: Any) -> set[str]:
    return {stage.name for stage in config.load(pipeline).stages}


def _measured(name: str) -> str:
    own = {p["preset"] for p in _presets_of(name)}
    found = rows_of({name, *own})
    tables = "\n\n".join(found) or "Nothing is on record for the reference models."
    beside = published(name)
    more = "\n\nFigures of papers, not measured here: [published accuracy](../accuracy.md#published)." if beside else ""
    caution = "Exact match on the reference models: small VLMs that read coloured digits on photographs. Figures tell methods apart there, and say nothing about a 7B."
    return f"{caution}\n\n{tables}{more}" if found else f"{tables}{more}"


def facts() -> str:
    rows = [["fact", "sites", "read", "holds"]]
    rows += [[f"`{spec.name}`", ", ".join(spec.sites), spec.read, _cell(prose(spec.means))] for spec in FACTS]
    letters = "N tokens of an image, ΣN of all images of a batch; D the LLM's width, d a head's; H heads, Hk key heads; T text tokens; P pixel values."
    return f"# Facts\n\nWhat a stage may ask about the visual tokens. {letters}\n\n{markdown(rows)}\n"


def cost_table() -> str:
    rows = [["stage", "site", "bytes", "FLOPs"]]
    for name, row in cost().items():
        flops = f"{'≥ ' if row.left_out else ''}{_scaled(row.flops, '')}"
        rows.append([f"[{name}](methods/{name}.md)", classes()[name].site, _scaled(row.fact_bytes, "B"), flops])
    missing = "; ".join(sentence for row in cost().values() for sentence in row.left_out)
    counted = markdown(
        [["pipeline", "operations"], *([label, str(most)] for label, (_, most, _) in operations.PIPELINES.items())]
    )
    return f"# Cost of deciding\n\n{ABOUT_COSTS}\n\n{markdown(rows)}\n\nNot counted: {missing}.\n\n## Operations\n\n{ABOUT_OPERATIONS}\n\n{counted}\n"


def preset_table() -> str:
    rows = [["preset", "stages", "what it is"]]
    for preset in _every_preset():
        names = list(dict.fromkeys(name for stage in preset["stages"] for name in stage))
        rows.append(
            [
                f"`{preset['preset']}`",
                " → ".join(f"[{n}](methods/{n}.md)" for n in names) or "none",
                _cell(prose(preset["summary"])),
            ]
        )
    about = "A preset is a paper's whole recipe, policies included; `vtoken.wrap(model, NAME)`. `fastervlm:64` is the bare stage."
    return f"# Presets\n\n{about}\n\n{markdown(rows)}\n"


def prose(text: str) -> str:
    """A docstring as Markdown: what looks like HTML or emphasis is text, and links are links."""
    parts = re.split(r"(`[^`]*`)", text)
    for k in range(0, len(parts), 2):
        part = parts[k].replace("<", "&lt;").replace("*", "\\*")
        parts[k] = re.sub(r"(https://[^\s),;]+[^\s),;.:])", r"<\1>", part)
    return "".join(parts)


def _cell(text: str) -> str:
    return " ".join(text.split())


def _scaled(value: int | None, unit: str) -> str:
    return "?" if value is None else scaled(value, unit)
