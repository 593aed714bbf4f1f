"""How the plugin serves a family, and the families, found by their files. Read when vLLM starts, so it imports nothing
heavy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any


@dataclass(frozen=True)
class Family:
    """How the plugin serves a family.

    Attributes:
        architecture: name of vLLM's model class.
        model: module and class that replace it.
        tower: module and class that check a pipeline against a checkpoint's config; they import no vLLM.
        positions: the only policy that its placeholders allow.
        text: pictures are keyed by their prompts if a stage reads those.
        no_cuts: why stages may not drop tokens between layers of the vision tower; "" if they may.
        newlines: pictures have newline tokens; crops: they are cut into crops.
        frames_apart: text stands between the frames of a video.
    """

    architecture: str
    model: str
    tower: str
    positions: str
    text: bool = True
    no_cuts: str = ""
    newlines: bool = False
    crops: bool = False
    frames_apart: bool = False


MROPE: dict[str, Any] = {  # for the Qwens
    "tower": "vtoken.serving._qwen_parts:QwenParts",
    "positions": "original",
    "no_cuts": "the blocks of its vision tower run no hooks in vLLM",
}


@lru_cache(maxsize=1)
def families() -> dict[str, Family]:
    """`model_type` -> the family."""
    names = sorted(module.name for module in iter_modules([str(Path(__file__).parent / "families")]))
    return {name: import_module(f"vtoken.serving.families.{name}").FAMILY for name in names}
