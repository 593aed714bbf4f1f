"""Options declared once, as fields of a class, and checked alike in YAML files, on the command line and in calls."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from vtoken.errors import ConfigError, shown

ImageSize = int | tuple[int, int]
FRAMES = 8  # of a video, where no other number is asked for
VIDEO = "a folder of frames, an animated GIF or WebP, MP4 or WebM (files need PyAV, all videos torchvision)"
DATA = (
    "`reference` (the shipped pictures), a folder with questions.jsonl, or a .jsonl file; one JSON object per line: "
    "image (path from that file), question, and answer if there is one"
)
POSITIONAL = "positional"  # the group of what is written without a flag
BOUNDS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
}


def option(
    default: Any,
    description: str,
    metavar: str | None = None,
    choices: Sequence[Any] | None = None,
    *,
    flags: tuple[str, ...] = (),
    group: str | None = None,
    read: Callable[[str], Any] | None = None,
    bare: str | None = None,
    **bounds: Any,
) -> Any:
    """A field of `Options`: its meaning, and what it may be. `...` is no default. The rest is for the command line.

    Args:
        metavar: what the help calls its value.
        flags: how it is written, in place of --ITS-NAME.
        group: options of one group exclude each other.
        read: makes a value of the text.
        bare: what the flag without a value stands for.
        bounds: as pydantic's `Field` takes them.
    """
    extra: Any = {"metavar": metavar, "choices": choices, "flags": flags, "group": group, "read": read, "bare": bare}
    return Field(default, description=description, json_schema_extra=extra, **bounds)


def argument(metavar: str, description: str, default: Any = ...) -> Any:
    """A field of `Options` that commands take without a flag."""
    return option(default, description, metavar, group=POSITIONAL)


def as_json(description: str = "print one JSON object and nothing else", group: str | None = None) -> Any:
    """The option --json, which help shows last."""
    return option(False, description, flags=("--json",), group=group)


class Options(BaseModel):
    """Options of a command, a YAML file or a function. Unknown names and values out of bounds are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def given(cls, **values: Any) -> Self:
        """The checked options.

        Raises:
            ConfigError: names the first option that cannot be used, and what it accepts.
        """
        try:
            return cls(**values)
        except ValidationError as error:
            raise ConfigError(problem(error.errors(include_url=False)[0])) from None

    @classmethod
    def of(cls, args: argparse.Namespace) -> Self:
        """The options of a parsed command line, checked alike."""
        values = {name: value for name, value in vars(args).items() if name in cls.model_fields}
        try:
            return cls(**values)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise ConfigError(problem({**first, "loc": [flag(str(name)) for name in first["loc"][:1]]})) from None

    @classmethod
    def add_to(cls, parser: argparse.ArgumentParser) -> None:
        """Declares every field as an option or argument of a command."""
        groups: dict[str | None, Any] = {None: parser, POSITIONAL: parser}
        for name, field in sorted(cls.model_fields.items(), key=lambda item: item[0] == "in_json"):
            extra: Any = field.json_schema_extra
            if extra["group"] not in groups:
                groups[extra["group"]] = parser.add_mutually_exclusive_group()
            written, about = _argument(name, field)
            groups[extra["group"]].add_argument(*written, **about)


def _argument(name: str, field: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """How a field is written on the command line, and what else `add_argument` takes for it."""
    extra, text = field.json_schema_extra, re.sub(r"%(?!\()", "%%", field.description)
    written, required = extra["flags"] or (flag(name),), field.is_required()
    if field.annotation is bool:
        return written, {"dest": name, "action": "store_true", "help": text}
    many, kind = _kind(field.annotation)
    default, metavar = None if required else field.default, extra["metavar"]
    about = {"type": extra["read"] or TYPES.get(kind, kind), "default": default, "choices": extra["choices"]}
    if extra["group"] == POSITIONAL:
        count = ("+" if required else "*") if many else None if required else "?"
        return (name,), {**about, "nargs": count, "metavar": metavar, "help": text}
    return written, {
        **about,
        "dest": name,
        "required": required,
        "nargs": "+" if many else None if extra["bare"] is None else "?",
        "const": extra["bare"],
        "metavar": metavar if extra["choices"] else metavar or METAVARS.get(kind),
        "help": text if default in (None, ()) or "(default" in text else f"{text} (default: %(default)s)",
    }


def declare(parser: argparse.ArgumentParser, command: Any) -> None:
    """Fills in the parser of a command, a module with DESCRIPTION, EXAMPLES, Settings, and run(settings)."""
    parser.description, parser.epilog = command.DESCRIPTION, command.EXAMPLES
    command.Settings.add_to(parser)
    parser.set_defaults(settings=command.Settings)


def flag(name: str) -> str:
    """How an option is written on the command line."""
    return f"--{name.replace('_', '-')}"


def problem(first: Any) -> str:
    """One of pydantic's errors in a sentence: which option, what it accepts, what was given."""
    name, kind, given = ".".join(map(str, first["loc"])), first["type"], shown(first["input"])
    if kind in BOUNDS:
        words, limit = BOUNDS[kind]
        return f"{name} must be {words} {first['ctx'][limit]}, not {given}"
    message = first["msg"].removeprefix("Value error, ")
    text = message if kind == "value_error" else f"{message}, not {given}"
    return f"{name}: {text}" if name else text


def _kind(annotation: Any) -> tuple[bool, Any]:
    """Whether an option takes several values, and the type of one."""
    if annotation == ImageSize | None:
        return False, ImageSize
    kinds = [kind for kind in get_args(annotation) if kind not in (NoneType, Ellipsis)]
    return get_origin(annotation) is tuple, kinds[0] if kinds else annotation


def number(text: str) -> float:
    """A finite number, as the type of an option."""
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r} is no finite number; write one such as 0.5")
    return found


def image_size(text: str) -> ImageSize:
    """One number of pixels, or height x width, as the type of an option."""
    try:
        sides = [int(side) for side in text.lower().split("x")]
    except ValueError:
        sides = []
    if len(sides) not in (1, 2) or min(sides) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no image size; write 336 or 480x640 (height x width)")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


METAVARS = {int: "N", float: "X", str: "NAME", Path: "FILE", ImageSize: "N|HxW"}
TYPES: dict[Any, Any] = {float: number, ImageSize: image_size}


class PictureOptions(Options):
    """What every prompt shows."""

    images: int = option(1, "images per prompt", ge=1)
    frames: int = option(1, "frames per image, which makes it a video (default: %(default)s, a still)", ge=1)
    image_size: ImageSize | None = option(
        None,
        "pixels of an image or frame (default: the vision tower's own size, 448x448 for Qwen); LLaVA-1.5 ignores it, "
        "so does OneVision for videos and several images",
    )

    @field_validator("image_size")
    @classmethod
    def _positive(cls, size: ImageSize | None) -> ImageSize | None:
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise ValueError(f"{size} must be at least 1 pixel a side")
        return size


class Workload(PictureOptions):
    """One `generate` call on prompts that are all alike."""

    text_tokens: int = option(64, "prompt tokens that are not visual", ge=0)
    new_tokens: int = option(64, "tokens generated, the first of them by prefill", ge=1)


class DeviceOptions(Options):
    """Where a model runs, and in which dtype."""

    device: str | None = option(None, "cpu, cuda, cuda:1 (default: the GPU if there is one)")
    dtype: str | None = option(None, "float32, bfloat16 or float16 (default: the model's own)")


class ModelCommand(DeviceOptions):
    """A command about one model."""

    model: str = argument("MODEL", "shipped model (tiny-llava), local folder or hub name")
    in_json: bool = as_json()


class SpeedOptions(Workload):
    """How `bench` measures at batch 1."""

    text_tokens: int = option(32, "prompt tokens that are not visual", ge=1)
    new_tokens: int = option(16, "tokens generated, the first of them by prefill, whatever the model would say", ge=1)
    repeats: int = option(7, "rounds that count", ge=1)
    warmup: int = option(2, "rounds before them that do not", ge=0)
    seed: int = option(0, "of texts, pictures and random weights")


class BenchOptions(SpeedOptions):
    """How `bench` measures."""

    batch: int = option(1, "prompts at a time", ge=1)
