"""What a search asks: prompts, with the right answers where they are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.errors import ConfigError, unknown
from vtoken.evals import reference
from vtoken.evals.lmms.prompts import Prompt, from_chat

if TYPE_CHECKING:  # It needs lmms-eval.
    from vtoken.evals.tune.tasks import Tasks

KEYS = ("image", "question", "answer")
OPTIONS = {"max_new_tokens": 32}


@dataclass(frozen=True)
class Sample:
    """One prompt, its right answer if it is known, and the generation options it comes with."""

    prompt: Prompt
    answer: str | None
    options: dict[str, Any]


def load(data: str, limit: int | None, frames: int = 8) -> list[Sample]:
    """Samples from "reference" (the shipped held-out questions), a JSONL file of {image, question, answer?}, or lmms-eval's tasks.

    Args:
        limit: first so many; of tasks: of each.
        frames: most of a video.

    Raises:
        ConfigError: no such data, or a line that cannot be used, with its number.
        VtokenError: tasks without lmms-eval, or tasks that cannot be loaded.
    """
    if (found := tasks(data, limit, frames)) is not None:
        return found.samples
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    if data == "reference":
        return [_sample(str(q.image), q.question, q.answer, {"max_new_tokens": 8}) for q in reference.questions(limit)]
    return _lines(Path(data), limit)


def tasks(data: str, limit: int | None, frames: int = 8, folders: Sequence[Path] = ()) -> Tasks | None:
    """lmms-eval's tasks, which ask and score; None of other data.

    Args:
        folders: with more tasks.

    Raises:
        As `load`.
    """
    if data == "reference" or data.endswith(".jsonl"):
        return None
    if limit is not None and limit < 1:
        raise ConfigError(f"limit must be at least 1, not {limit}")
    from vtoken.evals.lmms.prepare import prepare

    prepare("vtoken tune on tasks")
    from vtoken.evals.tune.tasks import Tasks

    return Tasks(data.split(","), limit, frames, folders)


def fingerprint(samples: list[Sample]) -> str:
    """sha256 over questions, answers, options and pictures."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.prompt.messages, sample.answer, sample.options], default=str).encode())
        for picture in [*sample.prompt.images, *(frame for clip in sample.prompt.clips for frame in clip.frames)]:
            found.update(str(picture.size).encode() + picture.tobytes())
    return found.hexdigest()


def _lines(file: Path, limit: int | None) -> list[Sample]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(file)!r}: {error}") from None
    found: list[Sample] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip() or (limit is not None and len(found) == limit):
            continue
        where = f"{file}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{where}: not valid JSON: {error}") from None
        if not isinstance(row, dict) or not all(isinstance(value, str) for value in row.values()):
            raise ConfigError(f'{where}: write {{"image": FILE, "question": TEXT}}, with "answer": TEXT if it is known')
        for key in row:
            if key not in KEYS:
                raise ConfigError(f"{where}: {unknown('key', key, KEYS)}")
        if "image" not in row or "question" not in row:
            raise ConfigError(f"{where}: image and question are both needed")
        found.append(_sample(str(file.parent / row["image"]), row["question"], row.get("answer"), OPTIONS))
    if not found:
        raise ConfigError(f"{file} holds no questions")
    return found


def _sample(image: str, question: str, answer: str | None, options: dict[str, Any]) -> Sample:
    content = [{"type": "image", "url": image}, {"type": "text", "text": question}]
    return Sample(from_chat([{"role": "user", "content": content}], frames=1), answer, options)
