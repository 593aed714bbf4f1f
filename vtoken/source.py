"""YAML text with the line of every key, so that errors point at it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import yaml

from vtoken.errors import ConfigError


@dataclass(frozen=True)
class Source:
    """Where values were read, so that errors point at a line; without a file they point at nothing."""

    file: str = ""
    lines: dict[tuple[Any, ...], int] = field(default_factory=dict)

    def error(self, path: tuple[Any, ...], message: str) -> ConfigError:
        while path not in self.lines and path:
            path = path[:-1]
        return ConfigError(f"{self.file}:{self.lines.get(path, 1)}: {message}" if self.file else message)


def parse(text: str, file: str) -> tuple[Any, Source]:
    """YAML text -> plain data, and the line of every key and item."""
    source = Source(file)
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        data = None if node is None else loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{file}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: not valid YAML: {error}") from None
    if node is not None:
        _note_lines(node, (), source, set())
    return data, source


def _note_lines(node: yaml.Node, path: tuple[Any, ...], source: Source, seen: set[int]) -> None:
    """Fills source.lines and refuses duplicate keys, which YAML loaders silently overwrite."""
    source.lines.setdefault(path, node.start_mark.line + 1)
    if id(node) in seen:  # An alias: it may even contain itself.
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            _note_lines(item, (*path, i), source, seen)
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            place, line = (*path, key.value), key.start_mark.line + 1
            if place in source.lines:
                first = source.lines[place]
                raise ConfigError(
                    f"{source.file}:{line}: duplicate key {key.value!r}, first on line {first}; remove one"
                )
            source.lines[place] = line
            _note_lines(value, place, source, seen)
