"""Names of stages and adapters, read off file names, and of presets; other packages add theirs by entry points.

A stage's module is imported when the stage is asked for, so this file imports neither torch nor pydantic. Other packages
declare `[project.entry-points."vtoken.stages"]` with `name = "package.module:Class"` (or a module that holds one stage);
the group `vtoken.adapters` does the same for model families, by `model_type`.
"""

from __future__ import annotations

import os
import re
import sys
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
_VARIANT = re.compile(r"^  ([\w-]+):$", re.MULTILINE)

# Families that look alike but are not, and why.
_HYBRID = (
    "its decoder alternates attention with linear-attention layers, whose state would run over other tokens than the cache holds; "
    "Qwen3-VL is the nearest supported family"
)
REFUSED = {"qwen3_5": _HYBRID, "qwen3_5_moe": _HYBRID}


def _files(folder: str) -> list[str]:
    path = str(ROOT / folder)
    return list(_listed(path, _changed(path)))


@lru_cache(maxsize=16)
def _listed(folder: str, changed: int) -> tuple[str, ...]:
    """Public names of the modules in a folder; listed again only when it has changed."""
    return tuple(sorted(m.name for m in iter_modules([folder]) if not m.name.startswith("_")))


@lru_cache(maxsize=16)
def _variants(folder: str, changed: int) -> tuple[str, ...]:
    """Names of the variants in all preset files of a folder: keys behind two spaces. No YAML is parsed for them."""
    texts = [file.read_text(encoding="utf-8") for file in Path(folder).glob("*.yaml")]
    return tuple(sorted(name for text in texts for name in _VARIANT.findall(text)))


def _built_in() -> dict[str, str]:
    """Stage name -> the package its module lives in."""
    return {name: place for folder in FOLDERS.values() for name, place in _methods(folder).items()}


def _methods(folder: str) -> dict[str, str]:
    """Stage name -> package, of one kind: a folder per site."""
    sites = [site for site in _files(folder) if (ROOT / folder / site).is_dir()]
    return {name: f"vtoken.{folder}.{site}" for site in sites for name in _files(f"{folder}/{site}")}


def _foreign(group: str) -> dict[str, list[EntryPoint]]:
    """Entry points of other packages by name; more than one under a name is an error when that name is asked for."""
    return _points(group, tuple((path, _changed(path)) for path in sys.path))


@lru_cache(maxsize=8)
def _points(group: str, state: tuple[tuple[str, int], ...]) -> dict[str, list[EntryPoint]]:
    """Reading every package's entry points is slow, so it is done again only when a folder of sys.path has changed."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=group):
        found.setdefault(point.name, []).append(point)
    return found


def _changed(path: str) -> int:
    try:
        return os.stat(path or ".").st_mtime_ns
    except OSError:
        return 0


def _origin(point: EntryPoint) -> str:
    package = f"package {point.dist.name} {point.dist.version}" if point.dist else "another package"
    return f"{package} ({point.value})"


def _load(what: str, name: str, built_in: dict[str, str], base: type[Any]) -> tuple[type[Any], str]:
    """The class called `name`, and where it comes from."""
    points = _foreign(f"vtoken.{what}s").get(name, [])
    claims = [f"vtoken itself ({built_in[name]}.{name})"] if name in built_in else []
    claims += [_origin(point) for point in points]
    if len(claims) > 1:
        raise ConfigError(
            f"{what} {name!r} is defined by {' and by '.join(claims)}; rename one entry point or uninstall its package"
        )
    if not points:
        return _only_class(import_module(f"{built_in[name]}.{name}"), base), claims[0]
    try:
        loaded = points[0].load()
    except Exception as error:  # Whatever another package's import raises, the user needs to know whose it is.
        raise ConfigError(
            f"{what} {name!r} of {claims[0]} cannot be imported: {type(error).__name__}: {error}; "
            "repair or uninstall that package"
        ) from error
    cls = _only_class(loaded, base) if isinstance(loaded, ModuleType) else loaded
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise ConfigError(f"{what} {name!r} of {claims[0]} is not a subclass of {base.__module__}.{base.__name__}")
    return cls, claims[0]


def _only_class(module: ModuleType, base: type[Any]) -> type[Any]:
    classes = [
        value
        for key, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not key.startswith("_")
    ]
    if len(classes) != 1:
        found = ", ".join(cls.__name__ for cls in classes) or "none"
        raise ConfigError(
            f"{module.__name__} must define exactly one public {base.__name__} subclass, found {found}; "
            "start the names of helpers with an underscore"
        )
    return classes[0]


def stages() -> list[str]:
    """Names of all stages, of vtoken and of installed packages; nothing is imported."""
    return sorted(_built_in() | _foreign("vtoken.stages"))


def is_built_in(name: str) -> bool:
    """Whether the stage is vtoken's own."""
    return name in _built_in()


def stage(name: str) -> type[Stage]:
    """The stage class of this name.

    Raises:
        ConfigError: unknown name, a second claim to it, a package that does not import, or a class that is no stage.
    """
    if name not in stages():
        raise ConfigError(unknown("stage", name, stages()))
    from vtoken.stages import SITES, Stage

    cls, origin = _load("stage", name, _built_in(), Stage)
    if cls.name != name:
        raise ConfigError(
            f"stage {name!r} of {origin}: the class {cls.__name__} calls itself {cls.name!r}; "
            f'declare `name: ClassVar[str] = "{name}"` in it'
        )
    if getattr(cls, "site", None) not in SITES or getattr(cls, "kind", None) not in FOLDERS:
        raise ConfigError(
            f"stage {name!r} of {origin}: {cls.__name__} must derive from Pruner or Compressor and declare "
            f"`site: ClassVar[Site]`, one of {', '.join(SITES)}"
        )
    return cls


def catalogue() -> tuple[dict[str, type[Stage]], dict[str, str]]:
    """Every stage that can be used, and why each of the others cannot."""
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
    folder = str(ROOT / "presets")
    return list(_variants(folder, _changed(folder)))


def preset_file(name: str) -> Path:
    """The YAML file that holds a preset, among the variants of its method."""
    return ROOT / "presets" / f"{name.partition('-')[0]}.yaml"


def adapters() -> list[str]:
    """Every `model_type` that has an adapter; nothing is imported."""
    return sorted({*_files("adapters"), *_foreign("vtoken.adapters")} - {"base"})


def adapter(model_type: str) -> type[Adapter]:
    """The adapter class of a model family.

    Raises:
        UnsupportedError: no adapter serves this `model_type`.
        ConfigError: two packages claim it, or the package that does cannot be imported.
    """
    if model_type in REFUSED and model_type not in adapters():
        raise UnsupportedError(f"model_type {model_type!r} is not supported: {REFUSED[model_type]}")
    if model_type not in adapters():
        raise UnsupportedError(
            f"{unknown('model_type', model_type, adapters())}; see vtoken/adapters/base.py to add a family"
        )
    from vtoken.adapters.base import Adapter

    own = {name: "vtoken.adapters" for name in _files("adapters")}
    cls, origin = _load("adapter", model_type, own, Adapter)
    if getattr(cls, "model_type", None) != model_type:
        raise ConfigError(
            f"adapter {model_type!r} of {origin}: {cls.__name__} serves {getattr(cls, 'model_type', None)!r}; "
            f'declare `model_type = "{model_type}"` in it'
        )
    return cls


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
    if kind == "preset":
        return presets()
    if kind == "adapter":
        return adapters()
    if kind not in FOLDERS:
        raise ConfigError(unknown("kind", kind, KINDS))
    names = list(_methods(FOLDERS[kind]))
    for name in _foreign("vtoken.stages"):
        try:
            names += [name] if stage(name).kind == kind and name not in names else []
        except ConfigError:
            continue
    return sorted(names)
