"""Files that are written whole or not at all; what others wrote is read with one sentence about what is wrong, never a
traceback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError, VtokenError, warn


def check_folder(file: Path | None) -> None:
    """Refuses a file that could not be written, before anything is computed."""
    if file is not None and not file.absolute().parent.is_dir():
        raise ConfigError(f"no folder {str(file.parent)!r} to write {file.name} into")
    if file is not None and file.is_dir():
        raise ConfigError(f"{file} is a folder; name a file")


def check_out(folder: Path) -> None:
    """Refuses a folder that could not be made, before anything is computed."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(f"{there} is a file; give another folder with --out")


def write(file: Path, what: str | bytes) -> None:
    """Writes beside, then renames: an interruption leaves what was there before."""
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(what.encode() if isinstance(what, str) else what)
    part.replace(file)


def read(file: Path) -> Any:
    """What a JSON file holds.

    Raises:
        FileNotFoundError: there is none.
        VtokenError: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise VtokenError(f"{file} cannot be read as JSON: {error}") from error


def kept(file: Path, fits: Callable[[Any], bool]) -> Any:
    """What a JSON file holds; None if there is none, and, with a warning, if it is torn or another kind of file.

    Args:
        fits: whether it is the right kind; that a key or a type is wrong, it may also say by an error.
    """
    problem = f"{file} does not hold what belongs there"
    try:
        found = read(file)
        if fits(found):
            return found
    except FileNotFoundError:
        return None
    except VtokenError as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError):
        pass
    warn(f"{problem}; taken as missing, so it is made anew")
    return None


def inside(folder: Path, name: Any, source: Path) -> Path:
    """The file of this name below a folder; `source` names it."""
    try:
        file = (folder / name).resolve()
        if file.is_relative_to(folder.resolve()):
            return file
    except (OSError, TypeError, ValueError):
        pass
    raise VtokenError(f"{source} names {str(name)[:80]!r}, which is no file in its folder; only those are read")
