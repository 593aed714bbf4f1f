"""How every method of `vtoken calibrate` says what it found: one JSON object, or a table and a sentence."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vtoken.config import dump, load
from vtoken.errors import ConfigError

Rows = Sequence[Sequence[str]]


def add_json(parser: argparse.ArgumentParser) -> None:
    """Declares --json."""
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")


def add_out(parser: argparse.ArgumentParser) -> None:
    """Declares --out, for methods that find a pipeline."""
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="pipeline file to write (default: print it)")


def check_out(out: Path | None) -> None:
    """Refuses a file that could not be written, before anything is computed.

    Raises:
        ConfigError: its folder does not exist.
    """
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"no folder {str(out.parent)!r} to write {out.name} into")


def tell(args: argparse.Namespace, found: Mapping[str, Any], rows: Rows, sentence: str, pipeline: str) -> None:
    """Prints what a method found.

    Args:
        args: of the command: `method`, `model`, `json`.
        found: the method's own numbers, plain data.
        rows: the table, its head first.
        pipeline: what commands take for a pipeline.
    """
    if args.json:
        print(json.dumps({"method": args.method, "model": args.model, "pipeline": pipeline, **found}))
        return
    from vtoken.evals.shared.console import show

    show(f"{args.method} for {args.model}", rows)
    print(sentence)


def tell_pipeline(
    args: argparse.Namespace, found: Mapping[str, Any], rows: Rows, about: str, stage: Mapping[str, Any]
) -> None:
    """The same for a pipeline of one stage, which goes into `args.out`, with a comment `about` it in front; without a file it goes to
    stdout, and what is said of it to stderr.

    Args:
        stage: name -> options.
    """
    text = f"# {about}\n{dump(load([dict(stage)]))}"
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    if args.json:
        tell(args, {"file": args.out and str(args.out), **found}, rows, about, text)
        return
    from vtoken.evals.shared.console import show

    show(f"{args.method} for {args.model}", rows, stderr=args.out is None)
    print(f"wrote {args.out}: {about}" if args.out else about, file=sys.stdout if args.out else sys.stderr)
    if args.out is None:
        print(text, end="")
