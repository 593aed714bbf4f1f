"""`vtoken list`: what there is to put into a pipeline."""

from __future__ import annotations

import json
import sys
from textwrap import fill
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, unknown
from vtoken.evals.shared.options import Options, argument, as_json, option

if TYPE_CHECKING:
    from vtoken.stages import Stage

DESCRIPTION = "Lists stages and presets; of one of them everything: what it does, options, families, paper."
EXAMPLES = """examples:
  vtoken list                                  # a line per stage, and the names of presets
  vtoken list fastervlm                        # a stage: options, presets, families
  vtoken list fastervlm-64                     # a preset: what it says
  vtoken list --site tokens --fact keys        # stages that act there and ask for that
  vtoken list --family qwen3_vl                # stages that run on this family (takes seconds)
  vtoken list --json | jq '.stages[].stage'    # one JSON object
  vtoken list --matrix                         # which stage runs on which family, and why not
  vtoken list --costs                          # what deciding costs on one picture of LLaVA-1.5-7B
  vtoken list --markdown                       # vtoken's own stages and presets
  vtoken list --markdown short                 # the table of docs/methods.md
"""
DIFFER = "NAME-64, a preset, is a paper's whole recipe, policies included; NAME:64 is the bare stage with its defaults."
SHORT_COLUMNS = ("stage", "site", "summary", "paper")
STAGE_COLUMNS = ("stage", "kind", "site", "needs", "options", "paper", "summary")
PRESET_COLUMNS = ("preset", "positions", "stages", "summary")
COST_COLUMNS = ("stage", "site", "facts", "bytes", "FLOPs", "families", "paper")


class Settings(Options):
    """What is listed, and how."""

    name: str | None = argument("NAME", "a stage or a preset; takes seconds", None)
    site: str | None = option(None, "stages that act there alone", "SITE")
    fact: str | None = option(None, "stages that ask for this fact alone (with default options)", "FACT")
    family: str | None = option(None, "stages that run on this model_type alone (takes seconds)", "FAMILY")
    markdown: str | None = option(
        None,
        "print Markdown tables: full (default) or short, as the docs embed it",
        choices=("full", "short"),
        bare="full",
        group="form",
    )
    matrix: bool = option(False, "stages x families instead (takes seconds, downloads nothing)", group="what")
    costs: bool = option(
        False,
        "families, FLOPs and bytes of every decision, deviations from the authors' code instead (takes seconds)",
        group="what",
    )
    in_json: bool = as_json("print one JSON object", group="form")


def run(asked: Settings) -> None:
    """Prints a list, or all about one stage or preset."""
    from vtoken.registry import catalogue, is_built_in

    if asked.name is not None:
        return _one(asked.name, asked)
    usable, broken = catalogue()
    classes = [cls for name, cls in usable.items() if is_built_in(name) or not asked.markdown]
    classes = _filtered(classes, asked)
    if asked.matrix:
        return _matrix(classes, asked)
    if asked.costs:
        return _costs(classes, asked)
    shown, among = [describe(cls) for cls in classes], presets()
    if asked.site or asked.fact or asked.family:
        names = {cls.name for cls in classes}
        among = [row for row in among if names & {name for stage in row["stages"] for name in stage}]
    if asked.in_json:
        _print_json({"stages": shown, "presets": among, "broken": broken})
    elif asked.markdown == "short":
        print(_markdown(SHORT_COLUMNS, shown))
    elif asked.markdown:
        print(_markdown(STAGE_COLUMNS, shown), _markdown(PRESET_COLUMNS, among), sep="\n\n")
    else:
        _print_lines(shown) if shown else print("no stage fits")
        names_of = " ".join(row["preset"] for row in among)
        print("", fill(f"presets: {names_of or 'none'}", 80, break_on_hyphens=False), "", fill(DIFFER, 80), sep="\n")
        print("", "`vtoken list NAME` has what there is to know about one of them", sep="\n")
        for name, reason in broken.items():
            print(f"broken: {name}: {reason}", file=sys.stderr)


def _one(name: str, asked: Settings) -> None:
    from vtoken import registry
    from vtoken.commands._one import details, show, show_preset

    if asked.model_copy(update={"name": None, "in_json": False}) != Settings():
        raise ConfigError(f"`vtoken list {name}` takes --json alone; leave the name out, or the other options")
    if name in registry.presets():
        if asked.in_json:
            _print_json(next(row for row in presets() if row["preset"] == name))
        else:
            show_preset(name)
        return
    if name not in registry.stages():
        known = [*registry.stages(), *registry.presets()]
        raise ConfigError(unknown("stage or preset", name, known, listed=registry.LIST, close=3))
    entry = details(registry.stage(name))
    _print_json(entry) if asked.in_json else show(entry)


def _filtered(classes: list[type[Stage]], asked: Settings) -> list[type[Stage]]:
    """The stages that --site, --fact and --family select."""
    from vtoken import registry
    from vtoken.stages import FACTS, SITES

    known = {"site": SITES, "fact": sorted({fact.name for fact in FACTS}), "family": registry.adapters()}
    for key, names in known.items():
        if (value := getattr(asked, key)) is not None and value not in names:
            raise ConfigError(unknown(key, value, names))
    if asked.site:
        classes = [cls for cls in classes if cls.site == asked.site]
    if asked.fact:
        classes = [cls for cls in classes if asked.fact in {need.partition("@")[0] for need in _needs(cls)}]
    if asked.family:
        from vtoken.evals.cost.support_matrix import support_matrix

        cells = support_matrix(classes, [asked.family]).cells
        classes = [cls for cls in classes if cells[cls.name][asked.family].answer != "no"]
    return classes


def _matrix(classes: list[type[Stage]], asked: Settings) -> None:
    from vtoken.evals.cost.support_matrix import support_matrix

    found = support_matrix(classes)
    notes, columns = found.notes(), ("stage", *found.models)
    numbered = [f"{k}. {note}" for k, note in enumerate(notes, start=1)]
    tried = f"Tried with the configs of {', '.join(found.models.values())}."
    rows: list[dict[str, Any]] = []
    for stage, row in found.cells.items():
        note = {family: found.note(stage, family) for family in row}
        answers = {f: c.answer + (f" [{notes.index(note[f]) + 1}]" if note[f] else "") for f, c in row.items()}
        rows.append({"stage": stage, **answers})
    if asked.in_json:
        _print_json(found.to_dict())
    elif asked.markdown:
        print(_markdown(columns, rows), "", *numbered, *([""] if notes else []), tried, sep="\n")
    else:
        _print(columns, rows)
        print(*numbered, tried, sep="\n")


def _costs(classes: list[type[Stage]], asked: Settings) -> None:
    from dataclasses import asdict

    from vtoken.evals.cost.decision_costs import costs

    found = costs(classes)
    about: dict[str, dict[str, Any]] = {
        cls.name: {"site": cls.site, "facts": _needs(cls), "paper": cls.paper, "deviations": cls.deviations}
        for cls in classes
    }
    rows = []
    for c in found:
        own = {"families": _families(c.families), "bytes": _short(c.fact_bytes, "B")}
        flops = ("≥ " if c.left_out else "") + _short(c.flops, "")
        rows.append({"stage": c.stage, "FLOPs": flops, **own, **about[c.stage]})
    missing = "; ".join(sentence for c in found for sentence in c.left_out)
    notes = [f"Not counted: {missing}."] if missing else []
    if asked.in_json:
        _print_json([{**asdict(c), **about[c.stage]} for c in found])
    elif asked.markdown:
        differences = [f"- **{row['stage']}**: {row['deviations']}" for row in rows if row["deviations"]]
        notes += ["Deviations from the authors' code:", "\n".join(differences)]
        print(_markdown(COST_COLUMNS, rows), *notes, sep="\n\n")
    else:
        _print(COST_COLUMNS[:-1], rows)
        print(*notes, sep="\n", end="\n" if notes else "")


def _print_json(what: Any) -> None:
    print(json.dumps(what, indent=2, ensure_ascii=False))


def _families(answers: dict[Any, list[str]]) -> str:
    """Families by answer of the matrix."""
    if list(answers) == ["yes"]:
        return "all"
    return "; ".join(f"{answer}: {', '.join(families)}" for answer, families in answers.items())


def _short(value: int | None, unit: str) -> str:
    """1181696 -> 1.18 M; "?" for what is not known."""
    from vtoken.evals.shared.tables import scaled

    return "?" if value is None else scaled(value, unit)


def describe(cls: type[Stage]) -> dict[str, Any]:
    """A stage as plain data."""
    module_doc = (sys.modules[cls.__module__].__doc__ or "").strip()
    return {
        "stage": cls.name,
        "kind": cls.kind,
        "site": cls.site,
        "needs": _needs(cls),
        "options": {
            name: {"required": field.is_required(), "default": _plain(field.get_default(call_default_factory=True))}
            for name, field in cls.model_fields.items()
        },
        "paper": cls.paper,
        "summary": (module_doc or cls.__doc__ or "").strip().split("\n")[0],
    }


def presets() -> list[dict[str, Any]]:
    """Every preset as plain data."""
    from vtoken import config, registry
    from vtoken.config.presets import summary

    rows = []
    for name in registry.presets():
        pipeline = config.load(name)
        policies = {key: getattr(pipeline, key) for key in config.POLICIES}
        stages = [{stage.name: stage.model_dump(mode="json")} for stage in pipeline.stages]
        rows.append({"preset": name, **policies, "stages": stages, "summary": summary(name)})
    return rows


def _needs(cls: type[Stage]) -> list[str]:
    """Facts of a stage with default options. `keep` has no default, but facts do not depend on it."""
    from vtoken.stages.budget import Budget

    options: dict[str, Any] = {"keep": Budget(64)} if "keep" in cls.model_fields else {}
    try:
        facts = cls.model_construct(**options).needs()
    except AttributeError:  # They depend on an option without a default.
        return ["depends on its options"]
    return [fact.name if fact.layer is None else f"{fact.name}@{fact.layer}" for fact in facts]


def _plain(default: Any) -> Any:
    from pydantic_core import PydanticUndefined, to_jsonable_python

    from vtoken.stages.budget import Budget

    return None if default is PydanticUndefined else to_jsonable_python(default, fallback=Budget.plain)


def _text(key: str, value: Any) -> str:
    """A value on one line."""
    from vtoken.commands._one import named

    if key == "options":
        return ", ".join(named(name, option) for name, option in value.items())
    if key == "stages":
        return " → ".join(
            f"{n} ({', '.join(f'{k}={_flow(v)}' for k, v in o.items())})" for s in value for n, o in s.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)


def _flow(value: Any) -> str:
    """As YAML writes it on one line: {per_crop: 64}."""
    return f"{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}" if isinstance(value, dict) else str(value)


def _markdown(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    from vtoken.evals.shared.tables import markdown

    def cell(text: str) -> str:
        return f"[{text.rpartition('/')[2]}]({text})" if text.startswith("https://") else text

    return markdown([columns, *([cell(_text(column, row[column])) for column in columns] for row in rows)])


def _print(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """The names of stages are never folded."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "stage")
    for row in rows:
        table.add_row(*(Text(_text(column, row[column])) for column in columns))
    Console().print(table)


def _print_lines(rows: list[dict[str, Any]]) -> None:
    """A line per stage: name, site and what it does; a terminal cuts it off, a file or pipe does not."""
    from rich.console import Console

    name, site = (max((len(row[key]) for row in rows), default=0) for key in ("stage", "site"))
    width = Console().width if sys.stdout.isatty() else None
    for row in rows:
        what = row["summary"].partition(": ")
        line = f"{row['stage']:{name}}  {row['site']:{site}}  {what[2] or what[0]}"
        print(line if width is None or len(line) <= width else f"{line[: width - 1]}…")
