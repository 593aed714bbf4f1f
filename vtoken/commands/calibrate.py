"""`vtoken calibrate`: compute the table or layer that a stage needs for a model, or train its gates."""

from __future__ import annotations

import argparse
from importlib import import_module
from pkgutil import iter_modules

from vtoken.evals import calibrate
from vtoken.evals.shared.options import Options, declare

EXAMPLES = """examples:
  vtoken calibrate vtw tiny-llava              # the layer before which all visual tokens can leave
  vtoken calibrate vtw tiny-llava --json       # the same, as one JSON object
  vtoken calibrate attention_exit tiny-llava -o exit.yaml
  vtoken calibrate METHOD --help               # options of a method

Every method takes --json: one object with method, model, pipeline (what other commands take: a name with options, or
YAML) and what it found. Without it a table and a sentence are printed; a pipeline that goes to no file goes to stdout,
and those to stderr.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One sub-command per module of `vtoken.evals.calibrate`."""
    parser.description = (
        "Compute the table or layer that a stage needs for a model, or train its gates; models stay as they are."
    )
    parser.epilog = EXAMPLES
    parsers = parser.add_subparsers(metavar="METHOD", dest="method", required=True)
    for found in iter_modules(calibrate.__path__):
        if not found.name.startswith("_"):
            module = import_module(f"{calibrate.__name__}.{found.name}")
            form = argparse.RawDescriptionHelpFormatter
            declare(parsers.add_parser(found.name, help=module.SUMMARY, formatter_class=form), module)


def kept(asked: Options) -> str:
    """Only dtome writes after every batch."""
    from vtoken.evals.calibrate.dtome import Settings

    if not isinstance(asked, Settings) or not asked.out.exists():
        return ""
    return f"what was learned so far is kept in {asked.out}; the same command goes on from it"


def run(asked: Options) -> None:
    """Runs the method whose settings these are."""
    import_module(type(asked).__module__).run(asked)
