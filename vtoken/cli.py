"""The command line. A command is a module of `vtoken.commands` with `DESCRIPTION`, `EXAMPLES`, `Settings` (its options,
declared once) and `run(settings)`. Only the module of the command in use is imported.

A command that runs for minutes has `kept(settings) -> str`: what an interrupted run has left and how to go on, "" for
nothing. A command with sub-commands has `add_arguments(parser)` in place of the first three.
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

from vtoken import __version__
from vtoken.errors import VtokenError, unknown

COMMANDS = {
    "list": "stages and presets, with their options and papers",
    "show": "draw which patches of a picture a pipeline keeps",
    "app": "a page in the browser: a picture, a question, dense and pruned",
    "serve": "a model with a pipeline behind an OpenAI-compatible API",
    "flops": "account for the FLOPs that a pipeline saves",
    "bench": "measure latency and memory with and without a pipeline",
    "eval": "score pipelines with lmms-eval's tasks",
    "report": "the page and the tables of an eval run",
    "sweep": "score and time pipelines x tasks from one file",
    "tune": "search stages and budgets that keep the answers",
    "calibrate": "compute the table, layer or gates that a stage needs for a model",
    "train-exit": "train the gates of dyvte for a model",
    "demo": "prune the shipped reference model and write a report",
    "schema": "JSON Schema of pipeline files, for editors",
}

EXAMPLES = """
examples:
  vtoken list                         what there is
  vtoken list --json                  the same, for programs
  vtoken demo                         see it work, without a download
  vtoken COMMAND --help               options and examples of a command

A pipeline is a preset (fastervlm-64), a stage in short (fastervlm:64, random:25%,seed=3), either with policies after it
(fastervlm:64,positions=compact), or a YAML file (mine.yaml). Several are parted by spaces.
"""


class _Parser(argparse.ArgumentParser):
    _mixing = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Lets options of a command stand between its arguments: `vtoken flops MODEL --images 2 PIPELINE`."""
        if self._subparsers is not None or self._mixing:
            return super().parse_known_args(args, namespace)
        self._mixing = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._mixing = False

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"vtoken: error: {message} (see `{self.prog} --help`)\n")


def _parser(command: str) -> argparse.ArgumentParser:
    """The parser, with the options of one command filled in."""
    parser = _Parser(
        prog="vtoken",
        description="Visual-token pruning for stock Hugging Face VLMs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-V", "--version", action="version", version=f"vtoken {__version__}")
    parsers = parser.add_subparsers(metavar="COMMAND", dest="command")
    for name, summary in COMMANDS.items():
        sub = parsers.add_parser(name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter)
        if name == command:
            module = import_module(f"vtoken.commands.{name.replace('-', '_')}")
            from vtoken.evals.shared.options import declare

            sub.set_defaults(module=module)
            module.add_arguments(sub) if hasattr(module, "add_arguments") else declare(sub, module)
    return parser


def _run(module: Any, settings: Any) -> None:
    from vtoken.evals.shared.bars import terminal_only

    try:
        with terminal_only():
            module.run(settings)
    except (ImportError, RuntimeError):
        from vtoken.evals.shared import torchvision

        torchvision.check()  # A broken torchvision is the likely cause, and transformers' own message has forty lines.
        raise


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code: 2 bad input (one line on stderr), 130 Ctrl-C, 141 stdout closed."""
    argv = list(sys.argv[1:] if argv is None else argv)
    module: Any = None
    settings: Any = None
    first = argv[0] if argv else "--help"
    try:
        if not first.startswith("-") and first not in COMMANDS:
            raise VtokenError(unknown("command", first, COMMANDS))
        args = _parser(first).parse_args(argv or ["--help"])
        module, settings = args.module, args.settings.of(args)
        _run(module, settings)
        sys.stdout.flush()
        return 0
    except BrokenPipeError:  # `vtoken list | head`: nobody reads on, and Python must not complain at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (VtokenError, OSError) as error:
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        rest = [f"({_kept(module, settings)})"] if full else []
        print("vtoken: error:", *str(error).split(), *rest, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if hasattr(module, "kept"):
            print(f"vtoken: interrupted; {_kept(module, settings)}", file=sys.stderr)
        return 130


def _kept(module: Any, settings: Any) -> str:
    """What an interrupted run has left, in words."""
    return (module.kept(settings) if hasattr(module, "kept") else "") or "nothing was kept"
