"""`vtoken list NAME`: all there is to know about one stage or preset."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.stages import Stage


def details(cls: type[Stage]) -> dict[str, Any]:
    """A stage as plain data: its entry of `vtoken list --json`, with the meaning of its options, the presets that use
    it, and the families that support it."""
    from vtoken.commands.list import describe, presets
    from vtoken.config.messages import accepts
    from vtoken.evals.cost.support_matrix import support_matrix

    entry = describe(cls)
    for option, field in cls.model_fields.items():
        entry["options"][option] |= {"accepts": accepts(cls, option), "description": field.description}
    answers = support_matrix([cls]).cells[cls.name]
    return {
        **entry,
        "does": " ".join((cls.__doc__ or "").partition("Paper:")[0].split()),
        "deviations": cls.deviations,
        "presets": [row for row in presets() if any(cls.name in stage for stage in row["stages"])],
        "families": {family: cell.to_dict() for family, cell in answers.items()},
        "example": example(cls),
    }


def example(cls: type[Stage]) -> str:
    """A pipeline with this stage, in short form. Required options other than `keep` come from a preset, if one uses the
    stage; else they are a word in capitals, for the reader to replace."""
    from vtoken import config, registry

    required = [name for name, field in cls.model_fields.items() if field.is_required()]
    if required in ([], ["keep"]):
        return f"{cls.name}:64" if required else cls.name
    for name in registry.presets():
        if any(type(stage) is cls for stage in config.load(name).stages):
            return name
    return f"{cls.name}:" + ",".join("64" if name == "keep" else f"{name}={name.upper()}" for name in required)


def call(pipeline: str) -> str:
    """The line of Python that runs a pipeline: `vtoken.draft` for pipelines of drafts, else `vtoken.wrap`."""
    from vtoken import config
    from vtoken.errors import ConfigError
    from vtoken.stages.facts import of_target

    try:
        stages = config.load(pipeline).stages
    except ConfigError:  # words in capitals, see `example`
        stages = ()
    drafts = any(of_target(need, stage.site) for stage in stages for need in stage.needs())
    return f'vtoken.draft(model, draft, "{pipeline}")' if drafts else f'vtoken.wrap(model, "{pipeline}")'


def show(entry: dict[str, Any]) -> None:
    """Prints `details` in 80 columns, or as many as the terminal has."""
    from rich.console import Console
    from rich.text import Text

    answers: dict[str, list[str]] = {}
    for family, cell in entry["families"].items():
        key = f"{cell['answer']}: {cell['reason']}" if cell["reason"] else cell["answer"]
        answers.setdefault(key, []).append(family)
    own = {
        "paper": entry["paper"],
        "facts": ", ".join(entry["needs"]),
        "families": "\n".join(f"{', '.join(families)}: {answer}" for answer, families in answers.items()),
        "deviations": entry["deviations"],
        "example": call(entry["example"]),
    }
    options = sorted(entry["options"].items(), key=lambda item: not item[1]["required"])
    given = {named(name, option): _option(option) for name, option in options}
    console = Console(highlight=False)
    console.print(
        Text(f"{entry['stage']}: a {entry['kind']} at site {entry['site']}"), Text(entry["summary"]), sep="\n"
    )
    console.print(Text(f"\n{entry['does']}\n"), _grid(own))
    for title, rows in {"options": given, "presets": {p["preset"]: p["summary"] for p in entry["presets"]}}.items():
        if rows:
            console.print(Text(f"\n{title}"), _grid({f"  {name}": text for name, text in rows.items()}))


def show_preset(name: str) -> None:
    """Prints the summary of a preset, its pipeline and an example."""
    from vtoken import config
    from vtoken.config.presets import summary

    print(summary(name), config.dump(config.load(name)).rstrip(), f"example: {call(name)}", sep="\n\n")


def named(name: str, option: dict[str, Any]) -> str:
    """An option by its name, and its default if it has one."""
    return name if option["required"] else f"{name}={json.dumps(option['default'])}"


def _option(option: dict[str, Any]) -> str:
    head = "has no default; " if option["required"] else ""
    return f"{head}{option['description'] or 'not described'} ({option['accepts']})"


def _grid(rows: dict[str, str]) -> Any:
    """Labels with texts beside them; rows without a text are left out."""
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2, 0, 0))
    for label, text in rows.items():
        if text:
            table.add_row(Text(label), Text(text))
    return table
