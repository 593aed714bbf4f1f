"""What a search asks: prompts, with the right answers where they are known."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vtoken.evals.lmms.prompts import Prompt, from_chat
from vtoken.evals.shared.samples import is_data, read

if TYPE_CHECKING:  # It needs lmms-eval.
    from vtoken.evals.tune.tasks import Tasks


@dataclass(frozen=True)
class Sample:
    """One prompt, its right answer if it is known, and the generation options it comes with."""

    prompt: Prompt
    answer: str | None
    options: dict[str, Any]


def load(data: str, limit: int | None, answered: bool = False) -> list[Sample]:
    """As prompts what `shared.samples.read` reads, by the same arguments."""
    options = {"max_new_tokens": 8 if data == "reference" else 32}
    return [_sample(str(each.image), each.question, each.answer, options) for each in read(data, limit, answered)]


def tasks(data: str, limit: int | None, folders: Sequence[Path] = ()) -> Tasks | None:
    """lmms-eval's tasks of these names, those in `folders` included, each with its first documents; None where `data`
    names what `load` reads."""
    if is_data(data):
        return None
    from vtoken.evals.lmms.prepare import prepare

    prepare("vtoken tune on tasks")
    from vtoken.evals.tune.tasks import Tasks

    return Tasks(data.split(","), limit, folders)


def fingerprint(samples: list[Sample]) -> str:
    """sha256 over questions, answers, options and pictures."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(json.dumps([sample.prompt.messages, sample.answer, sample.options], default=str).encode())
        for picture in sample.prompt.pictures:
            found.update(str(picture.size).encode() + picture.tobytes())
    return found.hexdigest()


def _sample(image: str, question: str, answer: str | None, options: dict[str, Any]) -> Sample:
    content = [{"type": "image", "url": image}, {"type": "text", "text": question}]
    return Sample(from_chat([{"role": "user", "content": content}], frames=1), answer, options)
