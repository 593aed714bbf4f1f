"""Commands that end where a pipeline is handed on."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest

from vtoken.cli import main


class Caught(Exception):
    """What a command hands on."""


def catch(found: list[Any], at: int | str) -> Any:
    """Takes the place of what measures: notes the pipelines, and ends the command."""

    def measure(*args: Any, **kwargs: Any) -> Any:
        found.append(args[at] if isinstance(at, int) else kwargs[at])
        raise Caught

    return measure


def ends(argv: list[str]) -> None:
    with pytest.raises(Caught):
        main(argv)


def lmms_model() -> Any:
    """`VtokenModel`, if lmms-eval is installed."""
    pytest.importorskip("lmms_eval")
    return import_module("vtoken.evals.lmms.model").VtokenModel
