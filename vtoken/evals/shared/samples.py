"""Pictures with questions, to calibrate, train or tune a stage on: the shipped set, a folder like it, or a file of JSON
lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import ConfigError, shown, unknown
from vtoken.evals import processors, reference
from vtoken.evals.shared import media, models
from vtoken.evals.shared.options import DATA

KEYS = ("image", "question", "answer")


@dataclass(frozen=True)
class Sample:
    """A question about one picture; without an answer the model's own is taken."""

    image: Path
    question: str
    answer: str | None = None


def read(data: str | None, limit: int | None = None, answered: bool = False) -> list[Sample]:
    """The first `limit` samples.

    Args:
        data: see DATA. None: the last of the shipped questions instead, so that the first ones stay fresh for a test.
        answered: whether all must have an answer.

    Raises:
        ConfigError: no such data, none in it, or a line that does not fit; names file and line.
    """
    if data in (None, "reference"):
        shipped = [Sample(q.image, q.question, q.answer) for q in reference.questions()]
        return shipped[:limit] if data else shipped[-(limit or 0) :]
    file = _file(data)
    if not os.path.isfile(file):
        raise ConfigError(f"no data {shown(data)}; give {DATA}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    lines = [line for line in enumerate(text.splitlines(), 1) if line[1].strip()]
    if not lines:
        raise ConfigError(f"{file} is empty; give {DATA}")
    found = [_sample(file, number, line) for number, line in lines[:limit]]
    if answered and any(sample.answer is None for sample in found):
        raise ConfigError(f"accuracy needs an answer to every question; {file} lacks some: add them, or take agreement")
    return found


def is_data(data: str) -> bool:
    """Whether `read` is to read it; else it may be the name of a task, which is no path."""
    return data == "reference" or os.sep in data or data.endswith(".jsonl") or os.path.isfile(_file(data))


def _file(data: str) -> Path:
    return Path(data) / "questions.jsonl" if os.path.isdir(data) else Path(data)


def _sample(file: Path, number: int, line: str) -> Sample:
    where = f"{file}, line {number}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in KEYS[:2]):
        raise ConfigError(f'{where}: write {{"image": FILE, "question": TEXT}}, with "answer": TEXT if it is known')
    for key in row:
        if "answer" not in row and key not in KEYS and get_close_matches(key, KEYS[2:]):
            raise ConfigError(f"{where}: {unknown('key', key, KEYS)}")
    image, answer = file.parent / row["image"], row.get("answer")
    if not os.path.isfile(image):
        raise ConfigError(f"{where}: no picture {shown(str(image))}")
    return Sample(image, row["question"], None if answer is None else str(answer))


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A shipped model, one in a folder or on the hub, and its processor."""
    model, processor = models.load_pair(name, device, dtype)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"the processor of {name!r} has no chat template, so that it is not known how a question is put"
        )
    return model, processor


def prepare(model: Any, processor: Any, sample: Sample) -> dict[str, Tensor]:
    """Model inputs of one sample, batch 1, on the model's device and in its dtype."""
    text = reference.prompt(processor, sample.question)
    return dict(processors.apply(processor, str(sample.image), model, images=[[media.still(sample.image)]], text=text))


@torch.no_grad()
def answer_of(model: Any, processor: Any, sample: Sample, inputs: dict[str, Tensor], most: int) -> Tensor:
    """[A] token ids of the sample's answer, the end token included, or of the model's own greedy answer if it has none;
    at most `most`."""
    if sample.answer is None:
        said: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=most)
        return said[0, inputs["input_ids"].shape[1] :]
    ids = processor.tokenizer(sample.answer, add_special_tokens=False).input_ids[: most - 1]
    return torch.tensor([*ids, processor.tokenizer.eos_token_id], device=model.device)


def continued(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The same inputs with text `ids` [A] after the prompt."""
    more = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "mm_token_type_ids": 0 * ids[None]}
    more["token_type_ids"] = more["mm_token_type_ids"]
    return {k: torch.cat([v, more[k].to(v.dtype)], 1) if k in more else v for k, v in inputs.items()}
