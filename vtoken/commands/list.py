"""`vtoken list`: what there is to put into a pipeline."""

from __future__ import annotations

import argparse
import json
import sys
from textwrap import wrap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.stages import Stage

EXAMPLES = """examples:
  vtoken list                                  # tables
  vtoken list --json | jq '.stages[].stage'    # one JSON object
  vtoken list --matrix                         # which stage runs on which family, and why not
  vtoken list --costs                          # what deciding costs on one picture of LLaVA-1.5-7B
  vtoken list --markdown                       # vtoken's own stages and presets, as in docs/methods.md
  vtoken list --markdown short                 # the table of the README
"""
DIFFER = "NAME-64, a preset, is a paper's whole recipe, policies included; NAME:64 is the bare stage with its defaults."
SHORT_COLUMNS = ("stage", "site", "summary", "paper")
STAGE_COLUMNS = ("stage", "kind", "site", "needs", "options", "paper", "summary")
PRESET_COLUMNS = ("preset", "positions", "stages", "summary")
COST_COLUMNS = ("stage", "site", "facts", "bytes", "FLOPs", "families", "paper")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Lists every stage (kind, site, facts it needs, options with defaults, paper) and every preset."
    )
    parser.epilog = EXAMPLES
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one JSON object")
    form.add_argument(
        "--markdown",
        nargs="?",
        const="full",
        choices=("full", "short"),
        help="print the tables that README and docs embed: full (default) or short",
    )
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--matrix", action="store_true", help="stages x families instead (takes seconds, downloads nothing)"
    )
    other.add_argument(
        "--costs",
        action="store_true",
        help="families, FLOPs and bytes of every decision, deviations from the authors' code instead (takes seconds)",
    )


def run(args: argparse.Namespace) -> int:
    from vtoken.registry import catalogue, is_built_in

    usable, broken = catalogue()
    classes = [cls for name, cls in usable.items() if is_built_in(name) or not args.markdown]
    if args.matrix:
        return _matrix(classes, args)
    if args.costs:
        return _costs(classes, args)
    shown = [describe(cls) for cls in classes]
    if args.json:
        print(json.dumps({"stages": shown, "presets": presets(), "broken": broken}, indent=2, ensure_ascii=False))
    elif args.markdown == "short":
        print(_markdown(SHORT_COLUMNS, shown))
    elif args.markdown:
        print(_markdown(STAGE_COLUMNS, shown), _markdown(PRESET_COLUMNS, presets()), sep="\n\n")
    else:
        _print_table(("stage", "kind", "site"), shown)
        _print_table(("preset",), presets())
        print(*wrap(DIFFER, 80), sep="\n")
        for name, reason in broken.items():
            print(f"broken: {name}: {reason}", file=sys.stderr)
    return 0


def _matrix(classes: list[type[Stage]], args: argparse.Namespace) -> int:
    from vtoken.evals.cost.support_matrix import support_matrix

    found = support_matrix(classes)
    notes = found.notes()
    if args.json:
        print(json.dumps(found.to_dict(), indent=2, ensure_ascii=False))
        return 0
    rows = [
        {
            "stage": stage,
            **{f: c.answer + (f" [{notes.index(c.reason) + 1}]" if c.reason else "") for f, c in row.items()},
        }
        for stage, row in found.cells.items()
    ]
    numbered = [f"{k}. {note}" for k, note in enumerate(notes, start=1)]
    tried = f"Tried with the configs of {', '.join(found.models.values())}."
    if args.markdown:
        print(_markdown(("stage", *found.models), rows), "", *numbered, *([""] if notes else []), tried, sep="\n")
    else:
        _print_wide(("stage", *found.models), rows)
        print(*numbered, tried, sep="\n")
    return 0


def _costs(classes: list[type[Stage]], args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from vtoken.evals.cost.decision_costs import costs

    found = costs(classes)
    about = {
        cls.name: {"site": cls.site, "facts": _needs(cls), "paper": cls.paper, "deviations": cls.deviations}
        for cls in classes
    }
    if args.json:
        print(json.dumps([{**asdict(c), **about[c.stage]} for c in found], indent=2, ensure_ascii=False))
        return 0
    rows = [
        {
            "stage": c.stage,
            "bytes": _short(c.fact_bytes, "B"),
            "FLOPs": ("≥ " if c.left_out else "") + _short(c.flops, ""),
            "families": _families(c.families),
            **about[c.stage],
        }
        for c in found
    ]
    missing = "; ".join(sentence for c in found for sentence in c.left_out)
    notes = [f"Not counted: {missing}."] if missing else []
    if args.markdown:
        differences = [f"- **{row['stage']}**: {row['deviations']}" for row in rows if row["deviations"]]
        print(
            _markdown(COST_COLUMNS, rows),
            *notes,
            "Deviations from the authors' code:",
            "\n".join(differences),
            sep="\n\n",
        )
    else:
        _print_wide(COST_COLUMNS[:-1], rows)
        for note in notes:
            print(note)
    return 0


def _families(answers: dict[Any, list[str]]) -> str:
    """Families by answer of the matrix."""
    if list(answers) == ["yes"]:
        return "all"
    return "; ".join(f"{answer}: {', '.join(families)}" for answer, families in answers.items())


def _short(value: int | None, unit: str) -> str:
    """1181696 -> 1.18 M; "?" for what is not known."""
    if value is None:
        return "?"
    power = max(p for p in range(5) if p == 0 or value >= 1000**p)
    return f"{value / 1000**power:.3g} {' kMGT'[power]}{unit}".replace("  ", " ").rstrip()


def describe(cls: type[Stage]) -> dict[str, Any]:
    """What a reader wants to know about a stage, as plain data."""
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
        stages = [{stage.name: stage.model_dump(mode="json")} for stage in pipeline.stages]
        rows.append(
            {
                "preset": name,
                **{key: getattr(pipeline, key) for key in config.POLICIES},
                "stages": stages,
                "summary": summary(name),
            }
        )
    return rows


def _needs(cls: type[Stage]) -> list[str]:
    """Facts of a stage with default options; `keep` has no default and no say in it."""
    from vtoken.stages.budget import Budget

    options: dict[str, Any] = {"keep": Budget(64)} if "keep" in cls.model_fields else {}
    try:
        facts = cls.model_construct(**options).needs()
    except AttributeError:  # It reads an option that has no default.
        return ["depends on its options"]
    return [fact.name if fact.layer is None else f"{fact.name}@{fact.layer}" for fact in facts]


def _plain(default: Any) -> Any:
    from pydantic_core import PydanticUndefined, to_jsonable_python

    from vtoken.stages.budget import Budget

    return None if default is PydanticUndefined else to_jsonable_python(default, fallback=Budget.plain)


def _text(key: str, value: Any) -> str:
    """A value on one line."""
    if key == "options":
        return ", ".join(n if o["required"] else f"{n}={json.dumps(o['default'])}" for n, o in value.items())
    if key == "stages":
        return " → ".join(
            f"{n} ({', '.join(f'{k}={_flow(v)}' for k, v in o.items())})" for s in value for n, o in s.items()
        )
    return ", ".join(value) if isinstance(value, list) else str(value)


def _flow(value: Any) -> str:
    """As YAML writes it on one line: {per_crop: 64}."""
    return f"{{{', '.join(f'{k}: {v}' for k, v in value.items())}}}" if isinstance(value, dict) else str(value)


def _markdown(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> str:
    lines = [columns, ["---"] * len(columns), *([_markdown_cell(_text(c, row[c])) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown_cell(text: str) -> str:
    if text.startswith("https://"):
        return f"[{text.rpartition('/')[2]}]({text})"
    return text.replace("|", "\\|")


def _print_wide(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == "stage")
    for row in rows:
        table.add_row(*(_text(column, row[column]) for column in columns))
    Console().print(table)


def _print_table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Short values side by side, the rest below the summary, so that 80 columns suffice."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from vtoken.config import POLICIES

    usual = {key: values[0] for key, (values, _) in POLICIES.items()}
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 1, 0))
    for column in columns:
        table.add_column(column, no_wrap=True)
    table.add_column("what it does", overflow="fold")
    for row in rows:
        told = [key for key in row if key not in (*columns, "summary") and row[key] != usual.get(key)]
        rest = [f"{key}: {text}" for key in told if (text := _text(key, row[key]))]
        table.add_row(*(row[column] for column in columns), Text("\n".join([row["summary"], *rest])))
    Console().print(table)
