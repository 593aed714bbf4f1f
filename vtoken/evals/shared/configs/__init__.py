"""Models by name and their configs: common ones without weights under their hub names, shipped ones, folders, the
hub."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, reason, shown, unknown
from vtoken.evals import reference

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def builtin() -> dict[str, dict[str, Any]]:
    """Config fields of the built-in models by hub name: what fixes their shapes and dtype, nothing else."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(__file__).parent.glob("*.json")):
        found |= json.loads(file.read_text())
    return found


def locate(model: str | Path) -> str:
    """Folder or hub name that transformers loads the model of this name from.

    Raises:
        ConfigError: a name that can be neither; nothing is loaded, nor asked of the hub.
    """
    name = str(model)
    if name in reference.names():
        return str(reference.path(name))
    if os.path.isdir(name) or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", name):
        return name
    if "/" in name or name.startswith((".", "~")):
        raise ConfigError(f"no model folder {shown(name)}; shipped models: {', '.join(reference.names())}")
    raise ConfigError(
        f"{unknown('model', name, [*reference.names(), *builtin()])}; or give a folder, or a hub name with its owner "
        "before a slash"
    )


def resolve_config(model: str | Path) -> PretrainedConfig:
    """The config of a built-in name, a shipped model (`tiny-llava`), a folder or a hub name, in that order.

    Raises:
        ConfigError: nothing of the kind was found; names what was tried.
    """
    from transformers import AutoConfig

    known, name = builtin(), str(model)
    source = name if name in known else locate(name)
    config: PretrainedConfig
    try:
        config = AutoConfig.for_model(**known[name]) if name in known else AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no config for {name!r}: not built in ({', '.join([*known, *reference.names()])}), and neither a folder "
            f"with a config.json nor on the hub ({reason(error)}); check the name, or give a local folder"
        ) from error
    return config
