"""How every method of `vtoken calibrate` prints what it found: one JSON object, or a table and a sentence."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import Any

from vtoken.config import dump, load
from vtoken.evals.shared.options import ModelCommand, option
from vtoken.evals.shared.tables import Rows, show

FLAGS = ("-o", "--out")


def weights_file() -> Any:
    """The option that names the file of weights to write."""
    return option(..., "safetensors file to write", flags=FLAGS)


def pipeline_file() -> Any:
    """The option that names the pipeline file to write."""
    return option(None, "pipeline file to write (default: print it)", flags=FLAGS)


def tell(
    asked: ModelCommand, found: Mapping[str, Any], rows: Rows, sentence: str, pipeline: str, *, stderr: bool = False
) -> None:
    """Prints what a method found.

    Args:
        asked: the method's settings; its module is called like it.
        found: the method's own numbers, plain data.
        rows: the table, its head first.
        pipeline: what commands take for a pipeline.
    """
    method = type(asked).__module__.rpartition(".")[2]
    if asked.in_json:
        print(json.dumps({"method": method, "model": asked.model, "pipeline": pipeline, **found}))
        return
    show(f"{method} for {asked.model}", rows, stderr=stderr)
    print(sentence, file=sys.stderr if stderr else sys.stdout)


def tell_pipeline(asked: Any, found: Mapping[str, Any], rows: Rows, about: str, stage: Mapping[str, Any]) -> None:
    """The same for a pipeline of one `stage` (name -> options). It goes into `asked.out`, with a comment `about` it in
    front; without a file it goes to stdout, and what is said of it to stderr."""
    text, out = f"# {about}\n{dump(load([dict(stage)]))}", asked.out
    if out is not None:
        out.write_text(text, encoding="utf-8")
    figures = {"file": out and str(out), **found}
    tell(asked, figures, rows, f"wrote {out}: {about}" if out else about, text, stderr=out is None)
    if out is None and not asked.in_json:
        print(text, end="")
