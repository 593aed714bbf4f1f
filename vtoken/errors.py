"""The errors vtoken raises on bad input. Each message is one sentence that names the cause and the fix."""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches

_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 160, 160


def shown(value: object) -> str:
    """`repr` for error messages, shortened to one line."""
    try:
        text = " ".join(_SHORT.repr(value).splitlines())
        return text if len(text) < 200 else f"{text[:190]}..."
    except ValueError:  # Python refuses to print integers of more than 4,300 digits.
        return f"a {type(value).__name__} too long to write"


# Packages whose frames lie between the user's call and the warning.
_BETWEEN = {"vtoken", "torch", "transformers", "peft", "accelerate", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warns at the user's line: the innermost frame outside vtoken and the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def reason(error: BaseException) -> str:
    """The first line of another library's message; the error's name where it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class VtokenError(Exception):
    """Any error that is not a bug in vtoken."""


class ConfigError(VtokenError, ValueError):
    """A pipeline, stage or option that cannot be used as written."""


class UnsupportedError(VtokenError, TypeError):
    """A model, or a pairing of model and stage, that vtoken cannot serve."""


class NotWholeError(VtokenError, ValueError):
    """The placeholders of a prompt do not match a whole number of encoded pictures."""


class OtherModelError(UnsupportedError):
    """Weights or tables of a stage that belong to another model; the message says how to make them for this one."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Prefixes errors raised inside the block with their subject, once: `preset "vtw-15": ...`. "" adds no prefix."""
    try:
        yield
    except VtokenError as error:
        if what and not str(error).startswith(what):
            error.args = (f"{what}: {error}",)
        raise


def either(words: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def unknown(what: str, name: object, known: Iterable[str], meant: str = "", listed: str = "", close: int = 1) -> str:
    """`unknown stage 'fastervm', did you mean 'fastervlm'? Known: ...`, for error messages.

    Args:
        meant: replaces the closest names as the suggestion.
        listed: the command that lists all known names, printed in place of a long list.
        close: how many of the closest names to suggest, at most.
    """
    names, text = sorted(known), shown(name)
    meant = meant or either(
        [repr(n) for n in get_close_matches(name if isinstance(name, str) else text, names, n=close)]
    )
    hint = f", did you mean {meant}?" if meant else "."
    return f"unknown {what} {text}{hint} " + (
        f"{listed} shows all" if listed else f"Known: {', '.join(names) or 'none'}"
    )
