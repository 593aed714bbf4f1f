"""Model configs without weights: common 7B and 13B models under their hub names, shipped models, folders, the hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, reason

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def builtin() -> dict[str, dict[str, Any]]:
    """Config fields of the built-in models by hub name: what fixes their shapes and dtype, nothing else."""
    found: dict[str, dict[str, Any]] = {}
    for file in sorted(Path(__file__).parent.glob("*.json")):
        found |= json.loads(file.read_text())
    return found


def resolve_config(model: str | Path) -> PretrainedConfig:
    """The config of a built-in name, a shipped model (`tiny-llava`), a folder or a hub name, in that order.

    Raises:
        ConfigError: nothing of the kind was found; names what was tried.
    """
    from transformers import AutoConfig

    from vtoken.evals import reference
    from vtoken.evals.shared.names import locate

    known, shipped = builtin(), reference.names()
    name = str(model)
    source = name if name in known else locate(name)
    config: PretrainedConfig
    try:
        config = AutoConfig.for_model(**known[name]) if name in known else AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"no config for {name!r}: not built in ({', '.join([*known, *shipped])}), and neither a folder with a "
            f"config.json nor on the hub ({reason(error)}); check the name, or give a local folder"
        ) from error
    return config
