"""Whether torchvision fits the installed torch, and which one does."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from vtoken.errors import ConfigError, reason


def check() -> None:
    """Refuses a torchvision that was not made for the torch beside it, which transformers imports everywhere.

    Raises:
        ConfigError: names both, and the one that fits.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # What it raises depends on what does not fit.
        raise ConfigError(
            f"torchvision {_version('torchvision')} does not go with torch {_version('torch')} "
            f"({reason(error)[:120]}): {mend()}, or uninstall torchvision"
        ) from error


def fitting(torch: str) -> str:
    """The torchvision made for a torch of this version: "2.13.0+cpu" -> "0.28"; "" where that is not known."""
    major, minor = torch.split(".")[:2]
    return f"0.{int(minor) + 15}" if major == "2" and minor.isdecimal() else ""


def mend() -> str:
    """What to type."""
    fits = fitting(_version("torch"))
    return f'pip install "torchvision=={fits}.*"' if fits else "pip install the torchvision made for it"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "of an unknown version"
