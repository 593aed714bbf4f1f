"""Where the model of a name is: shipped, in a folder or on the hub. Wrong names are refused before anything is
loaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from vtoken.errors import ConfigError, shown, unknown
from vtoken.evals import reference


def locate(model: str | Path) -> str:
    """Folder or hub name that transformers loads the model of this name from."""
    name = str(model)
    if name in reference.names():
        return str(reference.path(name))
    if os.path.isdir(name) or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return name
    if "/" in name or name.startswith((".", "~")):
        raise ConfigError(f"no model folder {shown(name)}; shipped models: {', '.join(reference.names())}")
    from vtoken.evals.shared.configs import builtin

    raise ConfigError(
        f"{unknown('model', name, [*reference.names(), *builtin()])}; or give a folder, or a hub name with its owner "
        "before a slash"
    )
