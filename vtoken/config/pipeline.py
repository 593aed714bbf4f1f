"""YAML, dict, list, name or stage -> Pipeline. Parsing is strict; every error says where it is and how to fix it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from numbers import Integral
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from vtoken import registry
from vtoken.config.beside import in_folder, is_repository, on_hub
from vtoken.config.contrast import Contrast, check_beside
from vtoken.config.messages import explain
from vtoken.config.policies import (
    CONTRAST,
    DRAFT,
    KEYS,
    LEAST,
    POLICIES,
    POLICY_KEYS,
    PRESET,
    Anyres,
    Newline,
    Positions,
    check,
)
from vtoken.config.presets import recipe
from vtoken.config.short_form import bare, options_of, parted
from vtoken.config.yaml_source import Source, read
from vtoken.config.yaml_source import dump as write_yaml
from vtoken.errors import ConfigError, about, shown, unknown
from vtoken.stages import Stage
from vtoken.stages.budget import Budget


@dataclass(frozen=True, repr=False)
class Pipeline:
    """Stages in the order in which data flows through them, and the policies that apply to all of them (see `vtoken
    schema`). Its repr is what `dump` writes.

    `draft` is the pipeline of the draft that `vtoken.draft(model)` makes, `contrast` what answers are compared with.
    `written` is what the user wrote, which errors quote; "" if the pipeline was not read from text.
    """

    name: str
    positions: Positions
    stages: tuple[Stage, ...]
    newline: Newline = "keep_if_row_has_token"
    anyres: Anyres = "model"
    min_visual_tokens: int = 0
    draft: Pipeline | None = None
    contrast: Contrast | None = None
    written: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check(vars(self), Source())
        if self.draft is not None and not isinstance(self.draft, Pipeline):
            raise ConfigError(f"{DRAFT} must be a Pipeline, not {shown(self.draft)}")
        if self.contrast is not None and not isinstance(self.contrast, Contrast):
            raise ConfigError(f"{CONTRAST} must be a Contrast, not {shown(self.contrast)}")
        check_beside(self)

    def __repr__(self) -> str:
        return dump(self)


PipelineLike = str | os.PathLike[str] | dict[str, Any] | Sequence[Any] | Stage | Pipeline


def load(pipeline: PipelineLike) -> Pipeline:
    """Reads a pipeline in any of its forms.

    Args:
        pipeline: a preset ("fastervlm-64") or one stage in short form ("fastervlm:64", "random:25%,seed=3",
            "pool:size=2"; a bare value is `keep`), either followed by policies ("flowcut-64,positions=original"); a
            path to a YAML file, or to a folder with a vtoken.yaml; a repository on the Hub that holds one
            ("owner/name", "owner/name@revision"); a dict as in the file; a list of names, one-key dicts and Stage
            objects; a Stage; a Pipeline.

    Raises:
        ConfigError: gives file and line if there is a file, the name that is wrong, and what is accepted.
    """
    if isinstance(pipeline, Pipeline):
        return pipeline
    if isinstance(pipeline, str):
        return _from_text(pipeline, Source())
    if isinstance(pipeline, os.PathLike):
        return _from_file(Path(pipeline))
    if isinstance(pipeline, dict):
        return _from_data(pipeline, "", Source())
    if isinstance(pipeline, (Stage, list, tuple)):
        return _from_data({"stages": [pipeline] if isinstance(pipeline, Stage) else pipeline}, "", Source())
    raise ConfigError(
        f"a pipeline is a preset name, a path, a dict, a list of stages or a stage, not {type(pipeline).__name__}"
    )


def dump(pipeline: Pipeline) -> str:
    """YAML text that loads to the same policies and stages, with every option written out."""
    return write_yaml(_plain_form(pipeline))


def _plain_form(pipeline: Pipeline) -> dict[str, Any]:
    stages = [{s.name: options} if (options := s.model_dump(mode="json")) else s.name for s in pipeline.stages]
    draft = {} if pipeline.draft is None else {DRAFT: _plain_form(pipeline.draft)}
    against = {}
    if (contrast := pipeline.contrast) is not None:
        against = {CONTRAST: {"alpha": contrast.alpha, "beta": contrast.beta, **_plain_form(contrast.pipeline)}}
    return {**{key: getattr(pipeline, key) for key in POLICY_KEYS}, **draft, **against, "stages": stages}


def _from_text(text: str, origin: Source) -> Pipeline:
    presets, path = registry.presets(), origin.placed(text)
    if text in presets:
        data, source = recipe(text)
        return replace(_from_data(data, text, source), written=f'preset "{text}"')
    if os.path.isfile(path):
        return _from_file(Path(path), beside=origin.beside)
    name, _, rest = text.partition(",")
    if rest and name in presets:
        return _short(text, name, rest, origin)
    if (short := parted(text)) is not None:
        return _short(text, *short, origin)
    if os.path.isdir(path) or Path(text).suffix in (".yaml", ".yml"):
        return _from_file(Path(path), beside=origin.beside)
    if is_repository(text):
        return _from_file(on_hub(text), text.partition("@")[0], origin.beside)
    raise ConfigError(
        f"{_unknown_preset(name if rest else text, after=text[len(name) :])}; or write a path to a YAML file, or a "
        "stage and its budget, as in fastervlm:64"
    )


def _short(text: str, name: str, rest: str, origin: Source) -> Pipeline:
    """The pipeline written as one line of text: a preset or a stage, and options, some of them policies."""
    written = f'{"preset" if name in registry.presets() else "pipeline"} "{shown(text)[1:-1]}"'
    with about(written):
        options = options_of(rest)
        data = {key: options.pop(key) for key in POLICY_KEYS if key in options}
        data |= {**options, PRESET: name} if name in registry.presets() else {"stages": [{name: options}]}
        return replace(_from_data(data, text, origin), written=written)


def _from_file(path: Path, name: str = "", beside: str = "") -> Pipeline:
    if os.path.isdir(path):
        path, name = in_folder(path), path.name
    if not os.path.isfile(path):
        close = get_close_matches(path.stem, registry.presets(), n=1)
        hint = f"; did you mean the preset {close[0]!r}?" if close else ""
        raise ConfigError(f"pipeline file {shown(str(path))} does not exist{hint}")
    data, source = read(path)
    found = _from_data(data, name or path.stem, replace(source, beside=beside))
    return replace(found, written=f"{path} ({found.written})" if found.written else str(path))


def _from_data(data: Any, name: str, source: Source, more: Sequence[str] = ()) -> Pipeline:
    """The pipeline of a mapping. `more` are keys that the caller has read; errors list them among the known ones."""
    if not isinstance(data, dict):
        raise source.error((), f"a pipeline is a mapping with positions and stages, not {shown(data)}")
    for key in data:
        if key not in KEYS:
            hint = f"; stages go into a list, stages: [{key}: ...]" if key in registry.stages() else ""
            raise source.error((key,), unknown("key", key, (*KEYS, *more)) + hint)
    preset = ""
    if PRESET in data:
        preset, data = _on_preset(data, source)
    policies = {key: _native(data.get(key, values[0])) for key, (values, _) in POLICIES.items()}
    policies[LEAST] = _native(data.get(LEAST, 0))
    items = data.get("stages")
    if not isinstance(items, (list, tuple)):
        raise source.error(
            ("stages",),
            f"stages must be a list, as in [fastervlm: {{keep: 64}}] (for none []), not {shown(items)}",
        )
    stages = tuple(_stage(item, ("stages", i), source) for i, item in enumerate(items))
    reads: dict[str, Callable[[Any, Source], Any]] = {DRAFT: _draft, CONTRAST: _contrast}
    others = {key: read_one(data[key], source) for key, read_one in reads.items() if key in data}
    check({**policies, "stages": stages}, source)
    name = name or preset or "+".join(s.name for s in stages) or "none"
    try:
        return Pipeline(name, stages=stages, written=preset and f'preset "{preset}"', **policies, **others)
    except ConfigError as error:
        raise source.error((DRAFT if others.get(DRAFT) else CONTRAST,), str(error)) from None


def _contrast(item: Any, source: Source) -> Contrast:
    """What stands under `contrast:`: a pipeline, alpha and beta."""
    if not isinstance(item, dict):
        raise source.error(
            (CONTRAST,), f"{CONTRAST} is a mapping, {{stages: [...], alpha: 1.0, beta: 0.1}}, not {shown(item)}"
        )
    numbers = {key: _native(item[key]) for key in ("alpha", "beta") if key in item}
    others = {key: value for key, value in item.items() if key not in numbers}
    against = _from_data(others, "", source.under(CONTRAST), ("alpha", "beta"))
    try:
        return Contrast(against, **numbers)
    except ConfigError as error:
        raise source.error((CONTRAST,), str(error)) from None


def _draft(item: Any, source: Source) -> Pipeline:
    """The pipeline under `draft:`: a preset, a short form, a list of stages or a mapping."""
    if isinstance(item, (dict, list, tuple)):
        return _from_data(item if isinstance(item, dict) else {"stages": item}, "", source.under(DRAFT))
    if source.beside:  # It might name a file that names it.
        raise source.error((DRAFT,), f"the pipeline of a draft has no {DRAFT} itself; leave it out")
    try:
        return _from_text(item, Source(beside=source.file)) if isinstance(item, str) else load(item)
    except ConfigError as error:
        raise source.error((DRAFT,), f"{DRAFT}: {error}") from None


def _on_preset(data: dict[str, Any], source: Source) -> tuple[str, dict[str, Any]]:
    """The name of the preset, and its contents overridden by the keys given here."""
    preset = _native(data[PRESET])
    if not isinstance(preset, str) or preset not in registry.presets():
        raise source.error((PRESET,), _unknown_preset(preset, "stages: [", "]"))
    if "stages" in data:
        raise source.error(("stages",), f"the stages are those of the preset {preset!r}; give one of the two")
    return preset, {**recipe(preset)[0], **data}


def _unknown_preset(name: Any, before: str = "", after: str = "") -> str:
    meant = bare(name, before, after) if isinstance(name, str) else ""
    return unknown(PRESET, name, registry.presets(), meant, listed=registry.LIST, close=3)


def _stage(item: Any, path: tuple[Any, ...], source: Source) -> Stage:
    if isinstance(item, Stage):
        return item
    if isinstance(item, str) and item not in registry.stages() and (short := parted(item)) is not None:
        try:
            item = {short[0]: options_of(short[1])}
        except ConfigError as error:
            raise source.error(path, f"{shown(item)}: {error}") from None
    name, options = next(iter(item.items())) if isinstance(item, dict) and len(item) == 1 else (item, None)
    if not isinstance(name, str):
        keys = f"; indent {list(item)[1:]} to make them options" if isinstance(item, dict) and len(item) > 1 else ""
        raise source.error(
            path,
            f"a stage is a name or one name with its options, fastervlm: {{keep: 64}}, not {shown(item)}{keys}",
        )
    try:
        cls = registry.stage(name)
    except ConfigError as error:
        raise source.error(path, str(error)) from error
    path = (*path, name)
    if not isinstance(options, (dict, type(None))):
        raise source.error(
            path, f"options of stage {name!r} must be a mapping, as in {{keep: 64}}, not {shown(options)}"
        )
    given = options or {}
    files = {key: source.placed(given[key]) for key in cls.file_options() if isinstance(given.get(key), str)}
    options = {**given, **files}
    try:
        # JSON mode is strict about numbers, strings and booleans, yet takes lists for tuples, as YAML writes them.
        return cls.model_validate_json(json.dumps(options, default=_plain), strict=True)
    except ValidationError as error:
        option, message = explain(cls, error)
        policy = (
            f"; {option} is a policy of the whole pipeline, write it beside stages" if option in POLICY_KEYS else ""
        )
        raise source.error((*path, option), f"stage {name!r}: {message}{policy}") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise source.error(path, f"options of stage {name!r} must be plain data: {error}") from None


def _native(value: Any) -> Any:
    """Python integers and strings in place of numpy's."""
    if isinstance(value, Integral) and not isinstance(value, int):
        return int(value)
    return str(value) if isinstance(value, str) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Budget):
        return value.plain()
    if isinstance(value, Integral):
        return int(value)
    raise TypeError(f"{shown(value)} is a {type(value).__name__}; write a number, text, list or mapping")
