"""What vtoken raises on bad input: one sentence that names the cause and the mend."""

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
    """`repr` for messages, of at most a line."""
    try:
        text = _SHORT.repr(value)
        return text if len(text) < 200 else f"{text[:190]}..."
    except ValueError:  # Python does not write whole numbers of more than 4,300 digits.
        return f"a {type(value).__name__} too long to write"


# Whose code stands between a call of the user's and a warning.
_BETWEEN = {"vtoken", "torch", "transformers", "peft", "accelerate", "contextlib", "functools"}


def warn(message: str) -> None:
    """Warns at the user's line: the innermost that is neither vtoken's nor of a library that calls it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _BETWEEN:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


class VtokenError(Exception):
    """Any error that is not a bug of vtoken."""


class ConfigError(VtokenError, ValueError):
    """A pipeline, stage or option that cannot be used as written."""


class UnsupportedError(VtokenError, TypeError):
    """A model, or a pairing of model and stage, that vtoken cannot serve."""


class NotWholeError(VtokenError, ValueError):
    """Placeholders of a prompt that are no whole number of the pictures that were encoded."""


class OtherModelError(UnsupportedError):
    """Weights or tables of a stage that belong to another model; names what makes those of this one."""


@contextmanager
def about(what: str) -> Iterator[None]:
    """Puts before what is raised inside what it is about, once: `preset "vtw-15": ...`; nothing if that is not known
    ("")."""
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
    """`unknown stage 'fastervm', did you mean 'fastervlm'? Known: ...`, for messages.

    Args:
        meant: what stands in place of the closest names, of which there are `close` at most.
        listed: the command that lists what is known, in place of a long list.
    """
    names, text = sorted(known), shown(name)
    meant = meant or either(
        [repr(n) for n in get_close_matches(name if isinstance(name, str) else text, names, n=close)]
    )
    hint = f", did you mean {meant}?" if meant else "."
    return f"unknown {what} {text}{hint} " + (
        f"{listed} shows all" if listed else f"Known: {', '.join(names) or 'none'}"
    )
