"""YAML text -> plain data with the line of every key, so that errors point at it; and plain data -> YAML text.

Stricter than YAML 1.1: a number is the decimal number that a person reads, a tag says no more than YAML itself reads without it, and
a document is bounded with its aliases and merge keys written out.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import yaml

from vtoken.errors import ConfigError, shown

CHARACTERS = 1_000_000  # patterns of every head of an 80-layer model take a quarter
DEPTH = 50

_TAG = "tag:yaml.org,2002:"
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")


@dataclass(frozen=True)
class Source:
    """Where values were read, so that errors point at a line; without a file they point at nothing."""

    file: str = ""
    lines: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def error(self, path: tuple[Any, ...], message: str) -> ConfigError:
        while path not in self.lines and path:
            path = path[:-1]
        return self.at(self.lines.get(path, 1), message)

    def at(self, line: int, message: str) -> ConfigError:
        return ConfigError(f"{self.file}:{line}: {message}" if self.file else message)


def read(path: Path) -> tuple[Any, Source]:
    """As `parse`, of a file.

    Raises:
        ConfigError: also where the file cannot be read.
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
        ConfigError: no YAML, or more than is read here (see above); with file and line.
    """
    source = Source(file)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None, source
        _check(node, {})
        data = loader.construct_document(node)
    except _Refusal as error:
        raise source.at(_line(error), str(error.problem)) from None
    except yaml.MarkedYAMLError as error:
        raise source.at(_line(error), f"not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise source.at(1, f"not valid YAML: {' '.join(str(error).split())}") from None
    _note_lines(node, (), source.lines)
    return data, source


def dump(data: Any, flow: bool | None = None) -> str:
    """YAML text that `parse` reads back. flow: on one line, or None for what is innermost on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow)


class _Refusal(yaml.MarkedYAMLError):
    def __init__(self, at: Any, problem: str) -> None:
        super().__init__(problem=problem, problem_mark=at.start_mark)


class _Loader(yaml.SafeLoader):
    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            return super().compose_node(parent, index)
        if self.depth == DEPTH:
            raise _Refusal(event, f"nested more than {DEPTH} deep")
        usual = {yaml.SequenceStartEvent: "seq", yaml.MappingStartEvent: "map"}.get(type(event))
        if usual and event.tag not in (None, "!", _TAG + usual):
            raise _foreign(event)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_scalar_node(self, anchor: Any) -> Any:
        event: Any = self.peek_event()
        node: Any = super().compose_scalar_node(anchor)
        tag = event.tag if event.tag != "!" else None
        if tag == _TAG + "str" or (tag is None and not event.implicit[0]):
            return node
        node.tag = _meaning(node, self.resolve(yaml.ScalarNode, node.value, (True, False)))
        if tag not in (None, node.tag, {_TAG + "int": _TAG + "float"}.get(node.tag)):
            raise _foreign(event)
        node.tag = tag or node.tag
        return node


class _Dumper(yaml.SafeDumper):
    pass


# YAML 1.1 takes 1e-3 for text, for want of a dot.
_Dumper.add_implicit_resolver(_TAG + "float", re.compile(_FLOAT.pattern + r"\Z"), list("-+.0123456789"))


def _meaning(node: Any, tag: str) -> str:
    """The tag of a plain scalar, given YAML 1.1's; refuses numbers that a person reads otherwise."""
    value, kind = node.value, tag.removeprefix(_TAG)
    if kind in ("timestamp", "value"):
        return _TAG + "str"
    if kind not in ("int", "float") and not _FLOAT.fullmatch(value):
        return tag
    if _WHOLE.fullmatch(value):
        if len(value) > 20 or not -(2**63) <= int(value) < 2**63:
            raise _Refusal(node, f"the whole number {shown(value)} ({len(value)} digits) does not fit in 64 bits")
        return tag
    if not _FLOAT.fullmatch(value):
        problem = "is not a number as people write it"
        if re.fullmatch(r"[-+]?\.[a-zA-Z]+", value):
            problem = "is not a finite number"
        raise _Refusal(node, f"{shown(value)} {problem}; write 64 or 0.5, or quote it if it is text")
    if not isfinite(float(value)):
        raise _Refusal(node, f"{shown(value)} is too large for a number; quote it if it is text")
    return _TAG + "float"


def _foreign(event: Any) -> _Refusal:
    return _Refusal(event, f"the tag {shown(event.tag.replace(_TAG, '!!'))} is not read here; leave it out")


def _line(error: yaml.MarkedYAMLError) -> int:
    return error.problem_mark.line + 1 if error.problem_mark else 1


def _check(node: Any, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Characters and depth of a node with its aliases written out; refuses too many, and keys given twice."""
    if id(node) in known:
        found = known[id(node)]
        if found is None:
            raise _Refusal(node, "an alias stands inside of what it names")
        return found
    known[id(node)] = None
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
    parts = [node.value] if isinstance(node, yaml.ScalarNode) else node.value
    size, depth = 1, 0
    for part in parts:
        for each in part if isinstance(part, tuple) else (part,):
            own = (len(each), 0) if isinstance(each, str) else _check(each, known)
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
    """After the data was made, so that mappings hold what was merged into them, their own keys last."""
    lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*path, i), lines)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            lines[*path, key.value] = key.start_mark.line + 1
            _note_lines(value, (*path, key.value), lines)
