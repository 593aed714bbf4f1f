"""Names of stages, presets and adapters, read from file names; other packages add theirs through entry points.

A stage's module is imported only when that stage is requested, so this file imports neither torch nor pydantic. Other
packages declare `[project.entry-points."vtoken.stages"]` with `name = "package.module:Class"` (or a module that holds
one stage); the group `vtoken.adapters` does the same for model families, by `model_type`.
"""

from __future__ import annotations

import os
import re
import sys
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, overload

from vtoken.errors import ConfigError, UnsupportedError, unknown

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.stages import Stage

ROOT = Path(__file__).parent
FOLDERS = {"pruner": "pruners", "compressor": "compressors"}
KINDS = ("pruner", "compressor", "preset", "adapter")
LIST = "`vtoken list`"

# Families that resemble a supported one but are not supported, and why.
REFUSED = {
    "deepseek_vl_hybrid": (
        "DeepSeek-VL 7B has a second tower (SAM) whose features are joined with those of the first; the 1.3B runs"
    ),
    "llama4": (
        "most layers of its decoder attend within chunks of the prompt, whose borders would move as tokens are dropped"
    ),
    "video_llama_3": (
        "behind its tower patches of videos are averaged by the size of the whole picture while those of images are "
        "not, so that a token is one patch or four; Qwen2-VL is the nearest supported family"
    ),
}

_VARIANT = re.compile(r"^  ([\w-]+):$", re.MULTILINE)
Dated = tuple[str, int]


def _dated(path: str | Path) -> Dated:
    """A folder and when it last changed: the key under which results of reading it are cached."""
    try:
        return str(path), os.stat(path or ".").st_mtime_ns
    except OSError:
        return str(path), 0


@lru_cache(maxsize=16)
def _modules(folder: Dated) -> tuple[str, ...]:
    return tuple(sorted(m.name for m in iter_modules([folder[0]]) if not m.name.startswith("_")))


@lru_cache(maxsize=4)
def _variants(folder: Dated) -> tuple[str, ...]:
    """Names in all preset files: keys indented by two spaces, so that no YAML has to be parsed."""
    texts = [file.read_text(encoding="utf-8") for file in Path(folder[0]).glob("*.yaml")]
    return tuple(sorted(name for text in texts for name in _VARIANT.findall(text)))


@lru_cache(maxsize=8)
def _entry_points(group: str, path: tuple[Dated, ...]) -> dict[str, list[EntryPoint]]:
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _foreign(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points of other packages by name. Two under one name are an error only when that name is requested."""
    return _entry_points(group, tuple(map(_dated, sys.path)))


def _methods(kind: str) -> dict[str, str]:
    """Names of vtoken's own stages of a kind -> the package of their module. A kind is a folder, with a subfolder per
    site."""
    root = ROOT / FOLDERS[kind]
    sites = [site for site in _modules(_dated(root)) if (root / site).is_dir()]
    return {name: f"vtoken.{FOLDERS[kind]}.{site}" for site in sites for name in _modules(_dated(root / site))}


def _built_in() -> dict[str, str]:
    return {name: package for kind in FOLDERS for name, package in _methods(kind).items()}


def _load(what: str, name: str, built_in: dict[str, str], base: type[Any], names: str) -> tuple[type[Any], str]:
    """The class called `name`, and a description of who defines it. Its class attribute called `names` must equal
    `name`."""
    points = _foreign(f"vtoken.{what}s").get(name, [])
    claims = [f"vtoken itself ({built_in[name]}.{name})"] if name in built_in else []
    for point in points:
        package = f"package {point.dist.name} {point.dist.version}" if point.dist else "another package"
        claims.append(f"{package} ({point.value})")
    if len(claims) > 1:
        raise ConfigError(
            f"{what} {name!r} is defined by {' and by '.join(claims)}; rename one entry point or uninstall its package"
        )
    whose = f"{what} {name!r} of {claims[0]}"
    try:
        loaded: Any = points[0].load() if points else import_module(f"{built_in[name]}.{name}")
    except Exception as error:  # The import of another package may raise anything; the user needs to know whose it is.
        if not points:
            raise
        raise ConfigError(
            f"{whose} cannot be imported: {type(error).__name__}: {error}; repair or uninstall that package"
        ) from error
    cls = _only_class(loaded, base) if isinstance(loaded, ModuleType) else loaded
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{whose} is not a subclass of {base.__module__}.{base.__name__}")
    if getattr(cls, names, None) != name:
        raise ConfigError(
            f"{whose}: the class {cls.__name__} calls itself {getattr(cls, names, None)!r}; "
            f'declare `{names}: ClassVar[str] = "{name}"` in it'
        )
    return cls, whose


def _only_class(module: ModuleType, base: type[Any]) -> type[Any]:
    own = [v for k, v in vars(module).items() if isinstance(v, type) and not k.startswith("_")]
    classes = [cls for cls in own if issubclass(cls, base) and cls.__module__ == module.__name__]
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ConfigError(
            f"{module.__name__} must define exactly one public {base.__name__} subclass, found {found}; "
            "start the names of helpers with an underscore"
        )
    return classes[0]


def stages() -> list[str]:
    """Names of all stages, of vtoken and of installed packages; imports nothing."""
    return sorted(_built_in() | _foreign("vtoken.stages"))


def is_built_in(name: str) -> bool:
    """Whether vtoken itself defines the stage."""
    return name in _built_in()


def stage(name: str) -> type[Stage]:
    """The stage class of this name.

    Raises:
        ConfigError: the name is unknown or claimed twice, its package cannot be imported, or the class is not a stage.
    """
    if name not in stages():
        raise ConfigError(unknown("stage", name, stages(), listed=LIST))
    from vtoken.stages import SITES, Stage

    cls, whose = _load("stage", name, _built_in(), Stage, "name")
    if getattr(cls, "site", None) not in SITES or getattr(cls, "kind", None) not in FOLDERS:
        raise ConfigError(
            f"{whose}: {cls.__name__} must derive from Pruner or Compressor and declare "
            f"`site: ClassVar[Site]`, one of {', '.join(SITES)}"
        )
    return cls


def catalogue() -> tuple[dict[str, type[Stage]], dict[str, str]]:
    """Every usable stage, and for each of the others the reason why it cannot be used."""
    usable: dict[str, type[Stage]] = {}
    broken: dict[str, str] = {}
    for name in stages():
        try:
            usable[name] = stage(name)
        except ConfigError as error:
            broken[name] = str(error)
    return usable, broken


def presets() -> list[str]:
    """Names of the shipped pipelines."""
    return list(_variants(_dated(ROOT / "presets")))


def preset_file(name: str) -> Path:
    """The YAML file that holds a preset, among the variants of its method."""
    return ROOT / "presets" / f"{name.partition('-')[0]}.yaml"


def adapters() -> list[str]:
    """Every `model_type` that has an adapter; imports nothing."""
    return sorted({*_modules(_dated(ROOT / "adapters")), *_foreign("vtoken.adapters")} - {"base"})


def adapter(model_type: str) -> type[Adapter]:
    """The adapter class of a model family.

    Raises:
        UnsupportedError: no adapter serves this `model_type`.
        ConfigError: two packages claim it, or the package that does cannot be imported.
    """
    if model_type not in adapters():
        if model_type in REFUSED:
            raise UnsupportedError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
        raise UnsupportedError(
            f"{unknown('model_type', model_type, adapters())}; see vtoken/adapters/base.py to add a family"
        )
    from vtoken.adapters.base import Adapter

    own = dict.fromkeys(_modules(_dated(ROOT / "adapters")), "vtoken.adapters")
    return _load("adapter", model_type, own, Adapter, "model_type")[0]


@overload
def available(kind: None = None) -> dict[str, list[str]]: ...
@overload
def available(kind: Literal["pruner", "compressor", "preset", "adapter"]) -> list[str]: ...
def available(kind: str | None = None) -> dict[str, list[str]] | list[str]:
    """Sorted names of one kind ("pruner", "compressor", "preset", "adapter"), or a dict of all four.

    Stages of other packages are imported to learn their kind; those that fail are left out (`vtoken list` tells why).

    Raises:
        ConfigError: a kind that does not exist.
    """
    if kind is None:
        return {each: available(each) for each in KINDS}  # type: ignore[call-overload]
    if kind not in KINDS:
        raise ConfigError(unknown("kind", kind, KINDS))
    if kind not in FOLDERS:
        return presets() if kind == "preset" else adapters()
    names = set(_methods(kind))
    for name in _foreign("vtoken.stages"):
        with suppress(ConfigError):
            names |= {name} if stage(name).kind == kind else set()
    return sorted(names)
