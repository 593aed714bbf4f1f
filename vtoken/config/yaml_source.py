"""YAML text -> plain data with the line of every key, for error messages; and plain data -> YAML text.

Stricter than YAML 1.1: numbers are decimal, as people read them; a tag must agree with what YAML reads without it; and
the size of a document is limited with its aliases and merge keys expanded.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field, replace
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from vtoken.config.beside import FILE
from vtoken.errors import ConfigError, shown

CHARACTERS = 1_000_000  # the patterns of all heads of an 80-layer model take a quarter of this
DEPTH = 50

_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Source:
    """Where values were read, so that errors can give a line; without a file, errors give none. `key`: the one under
    which they stand, "" at the top. `beside`: the file whose draft they are."""

    file: str = ""
    lines: dict[tuple[Any, ...], int] = field(default_factory=dict)
    key: str = ""
    beside: str = ""

    def placed(self, path: str) -> str:
        """The absolute path of a file or model folder beside it; others stay relative to the working directory."""
        origin = self.file or self.beside
        found = os.path.join(os.path.dirname(origin), path)
        there = os.path.isfile(found) or os.path.isfile(os.path.join(found, FILE))
        return os.path.abspath(found) if origin and path and there else path

    def under(self, *path: Any) -> Source:
        """Of the values under a key, whose errors name it; they are then read like a file of their own."""
        depth = len(path)
        lines = {key[depth:]: line for key, line in self.lines.items() if key[:depth] == path}
        return replace(self, lines=lines, key=str(path[-1]))

    def error(self, path: tuple[Any, ...], message: str) -> ConfigError:
        while path not in self.lines and path:
            path = path[:-1]
        return self.at(self.lines.get(path, 1), f"{self.key}: {message}" if self.key else message)

    def at(self, line: int, message: str) -> ConfigError:
        return ConfigError(f"{self.file}:{line}: {message}" if self.file else message)


def read(path: Path) -> tuple[Any, Source]:
    """As `parse`, for a file.

    Raises:
        ConfigError: as in `parse`, or the file cannot be read.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from None
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path.
        raise ConfigError(f"cannot read {shown(str(path))}: {getattr(error, 'strerror', None) or error}") from None
    return parse(text, str(path))


def parse(text: str, file: str = "") -> tuple[Any, Source]:
    """YAML text -> plain data, and the line of every key and item.

    Raises:
        ConfigError: the text is not YAML, or breaks the rules above; gives file and line.
    """
    source = Source(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, source
        _check(node, {}, loader)
        data = loader.construct_document(node)
    except RecursionError:
        raise source.at(1, f"nested more than {DEPTH} deep") from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        mark = getattr(error, "problem_mark", None)
        problem = problem if isinstance(error, _Refusal) else f"not valid YAML: {problem}"
        raise source.at(mark.line + 1 if mark else 1, problem) from None
    _note_lines(node, (), source.lines)
    return data, source


def dump(data: Any, flow: bool | None = None) -> str:
    """YAML text that `parse` reads back. flow=True writes one line; None writes only the innermost collections on one
    line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow)


class _Refusal(yaml.MarkedYAMLError):
    def __init__(self, at: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=at.start_mark)


class _Loader(yaml.SafeLoader):
    """Reads dates and `=` as text."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in forms if tag not in (_TAG + "timestamp", _TAG + "value")]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


class _Dumper(yaml.SafeDumper):
    pass


for _each in (_Loader, _Dumper):  # YAML 1.1 reads 1e-3 as text, because it has no dot.
    _each.add_implicit_resolver(_TAG + "float", re.compile(_FLOAT.pattern + r"\Z"), list("-+.0123456789"))


def _check_scalar(node: Any, loader: _Loader) -> None:
    """Refuses tags that disagree with the text, and numbers that YAML reads differently from people."""
    value, tag = node.value, node.tag.removeprefix(_TAG)
    if tag == "str":
        return
    means = loader.resolve(yaml.ScalarNode, value, (True, False)).removeprefix(_TAG)
    if tag != means and (tag, means) != ("float", "int"):
        raise _foreign(node)
    if means == "int" and _WHOLE.fullmatch(value):
        if len(value) > 20 or not -(2**63) <= int(value) < 2**63:
            raise _Refusal(node, f"the whole number {shown(value)} ({len(value)} digits) does not fit in 64 bits")
    elif means in ("int", "float") and not _FLOAT.fullmatch(value):
        problem = "a finite number" if re.fullmatch(r"[-+]?\.[a-zA-Z]+", value) else "a number as people write it"
        raise _Refusal(node, f"{shown(value)} is not {problem}; write 64 or 0.5, or quote it if it is text")
    elif means == "float" and not isfinite(float(value)):
        raise _Refusal(node, f"{shown(value)} is too large for a number; quote it if it is text")


def _foreign(node: Any) -> _Refusal:
    return _Refusal(node, f"the tag {shown(node.tag.replace(_TAG, '!!'))} is not read here; leave it out")


def _check(node: Any, known: dict[int, tuple[int, int] | None], loader: _Loader) -> tuple[int, int]:
    """Characters and depth of a node with its aliases expanded; refuses documents that exceed the limits, and duplicate
    keys."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _Refusal(node, "an alias stands inside of what it names")
        return found
    known[id(node)] = None
    size, depth = 1, 0
    if isinstance(node, yaml.ScalarNode):
        _check_scalar(node, loader)
        size += len(node.value)
    elif node.tag != _TAG + {"sequence": "seq", "mapping": "map"}[node.id]:
        raise _foreign(node)
    elif isinstance(node, yaml.MappingNode):
        _check_keys(node)
    for part in () if isinstance(node, yaml.ScalarNode) else node.value:
        for each in part if isinstance(part, tuple) else (part,):
            own = _check(each, known, loader)
            size, depth = size + own[0], max(depth, own[1])
    if size > CHARACTERS:
        raise _Refusal(node, f"more than {CHARACTERS:,} characters with its aliases written out")
    if depth == DEPTH:
        raise _Refusal(node, f"nested more than {DEPTH} deep with its aliases written out")
    known[id(node)] = size, depth + 1
    return size, depth + 1


def _check_keys(node: Any) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            raise _Refusal(key, "a key must be a name, not a list or mapping")
        if key.value in lines:
            raise _Refusal(key, f"duplicate key {shown(key.value)}, first on line {lines[key.value]}; remove one")
        lines[key.value] = key.start_mark.line + 1


def _note_lines(node: Any, path: tuple[Any, ...], lines: dict[tuple[Any, ...], int]) -> None:
    """Runs after the data was constructed, when mappings hold the keys merged into them, followed by their own keys."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*path, i), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[*path, key.value] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines)
