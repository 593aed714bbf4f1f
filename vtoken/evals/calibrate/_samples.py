"""Pictures with questions, as a model is asked them: shipped ones, or the lines of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError


def samples(file: Path | None, limit: int) -> list[tuple[Path, str]]:
    """(picture, question) of the first `limit` lines of a file of JSON objects with `image`, a path from the file's folder on, and
    `question`; None takes shipped questions from the last one backwards, so that the first ones stay fresh for a test.

    Raises:
        ConfigError: a file or line that does not read, or nothing at all.
    """
    from vtoken.evals import reference

    if limit < 1:
        raise ConfigError(f"--limit must be at least 1, not {limit}")
    if file is None:
        return [(question.image, question.question) for question in reference.questions()[::-1][:limit]]
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()][:limit]
        found = [(file.parent / row["image"], str(row["question"])) for row in map(json.loads, lines)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f'cannot read {file}: {error}; write one JSON object per line, {{"image": "a.jpg", "question": "..."}}'
        ) from None
    if not found:
        raise ConfigError(f"{file} has no lines")
    return found


def prompts(model: Any, processor: Any, asked: Sequence[tuple[Path, str]]) -> Iterator[Any]:
    """Model inputs of every sample, one at a time, on the model's device and in its dtype."""
    from PIL import Image, UnidentifiedImageError

    from vtoken.evals import reference

    for path, question in asked:
        try:
            with Image.open(path) as file:
                picture = file.convert("RGB")
        except (OSError, UnidentifiedImageError) as error:
            raise ConfigError(f"cannot read picture {path}: {error}") from error
        inputs = processor(images=picture, text=reference.prompt(processor, question), return_tensors="pt")
        inputs = inputs.to(model.device)
        yield {**inputs, "pixel_values": inputs["pixel_values"].to(model.dtype)}
