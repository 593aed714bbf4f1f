"""vtoken: visual-token pruning for stock Hugging Face VLMs.

Importing this package imports nothing else: the names below fetch their modules when first used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.registry import available
    from vtoken.wrap import trace, unwrap, wrap, wrapped

__version__ = "0.1.0"
__all__ = ["available", "match_processor", "trace", "unmatch_processor", "unwrap", "wrap", "wrapped"]

_HOME = {
    "available": "vtoken.registry",
    "match_processor": "vtoken.wrap",
    "trace": "vtoken.wrap",
    "unmatch_processor": "vtoken.wrap",
    "unwrap": "vtoken.wrap",
    "wrap": "vtoken.wrap",
    "wrapped": "vtoken.wrap",
}


class _Package(ModuleType):
    def __setattr__(self, name: str, value: Any) -> None:
        # Importing the submodule vtoken.wrap binds it over the function of the same name; the function wins.
        super().__setattr__(name, value.wrap if name == "wrap" and isinstance(value, ModuleType) else value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'vtoken' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
