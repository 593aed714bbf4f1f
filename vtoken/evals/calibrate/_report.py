"""How every method of `vtoken calibrate` tells what it found: one JSON object, or a table and a sentence."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vtoken.config import dump, load
from vtoken.errors import ConfigError
from vtoken.evals.shared.tables import Rows, show

PIPELINE = {"help": "pipeline file to write (default: print it)"}
WEIGHTS = {"help": "safetensors file to write", "required": True}


def declare(parser: argparse.ArgumentParser, module: Any) -> None:
    """The options of one method, or of another command that is declared like one."""
    parser.description, parser.epilog = module.DESCRIPTION, module.EXAMPLES
    parser.add_argument("model", metavar="MODEL", help="shipped model (tiny-llava), local folder or hub name")
    module.Settings.add_to(parser)
    if module.OUT is not None:
        parser.add_argument("-o", "--out", type=Path, metavar="FILE", **module.OUT)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.set_defaults(calibrate=module.run)


def check_out(out: Path | None) -> None:
    """Refuses a file that could not be written, before anything is computed."""
    if out is not None and not out.parent.is_dir():
        raise ConfigError(f"no folder {str(out.parent)!r} to write {out.name} into")


def tell(
    args: argparse.Namespace,
    found: Mapping[str, Any],
    rows: Rows,
    sentence: str,
    pipeline: str,
    *,
    stderr: bool = False,
) -> None:
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
    show(f"{args.method} for {args.model}", rows, stderr=stderr)
    print(sentence, file=sys.stderr if stderr else sys.stdout)


def tell_pipeline(
    args: argparse.Namespace, found: Mapping[str, Any], rows: Rows, about: str, stage: Mapping[str, Any]
) -> None:
    """The same for a pipeline of one `stage` (name -> options). It goes into `args.out`, with a comment `about` it in
    front; without a file it goes to stdout, and what is said of it to stderr."""
    text, out = f"# {about}\n{dump(load([dict(stage)]))}", args.out
    if out is not None:
        out.write_text(text, encoding="utf-8")
    told = {"file": out and str(out), **found}
    tell(args, told, rows, f"wrote {out}: {about}" if out else about, text, stderr=out is None)
    if out is None and not args.json:
        print(text, end="")
