"""Pictures with questions, to calibrate or train a stage on: the shipped set, a folder like it, or a file of JSON lines."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vtoken.errors import ConfigError, shown
from vtoken.evals import processors, reference
from vtoken.evals.shared import media, models

ABOUT = (
    "`reference` (the shipped pictures), a folder with questions.jsonl, or a .jsonl file; one JSON object per line: image (path from "
    "that file), question, and answer if there is one"
)


@dataclass(frozen=True)
class Sample:
    """A question about one picture; without an answer the model's own is taken."""

    image: Path
    question: str
    answer: str | None = None


def read(data: str, limit: int | None = None) -> list[Sample]:
    """The first `limit` samples.

    Args:
        data: see ABOUT.

    Raises:
        ConfigError: no such data, none in it, or a line that does not fit; names file and line.
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"the limit must be at least 1 question, not {limit}")
    if data == "reference":
        return [Sample(q.image, q.question, q.answer) for q in reference.questions(limit)]
    file = Path(data) / "questions.jsonl" if os.path.isdir(data) else Path(data)
    if not os.path.isfile(file):
        raise ConfigError(f"no data {shown(data)}; give {ABOUT}")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {file}: {error}") from None
    lines = [line for line in enumerate(text.splitlines(), 1) if line[1].strip()]
    if not lines:
        raise ConfigError(f"{file} is empty; give {ABOUT}")
    return [_sample(file, number, line) for number, line in lines[:limit]]


def _sample(file: Path, number: int, line: str) -> Sample:
    try:
        row = json.loads(line)
        image, question, answer = row["image"], row["question"], row.get("answer")
        found = Sample(file.parent / image, str(question), None if answer is None else str(answer))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{file}, line {number}: not a JSON object with image and question") from None
    if not os.path.isfile(found.image):
        raise ConfigError(f"{file}, line {number}: no picture {shown(str(found.image))}")
    return found


def load(name: str, device: str | None = None, dtype: str | None = None) -> tuple[Any, Any]:
    """A shipped model, one in a folder or on the hub, and its processor.

    Raises:
        ConfigError: it cannot be loaded, or has no chat template to put questions in.
    """
    shipped = name in reference.names()
    processor = processors.load(reference.path(name) if shipped else name, pillow=shipped)
    if not getattr(processor, "chat_template", None):
        raise ConfigError(
            f"the processor of {name!r} has no chat template, so that it is not known how a question is put"
        )
    return models.load(name, device=device, dtype=dtype), processor


def prepare(model: Any, processor: Any, sample: Sample) -> dict[str, Tensor]:
    """Model inputs of one sample, batch 1, on the model's device and in its dtype.

    Raises:
        ConfigError: its picture cannot be read.
        UnsupportedError: the processor refuses it.
    """
    text = reference.prompt(processor, sample.question)
    inputs = processors.apply(processor, str(sample.image), images=[[media.still(sample.image)]], text=text)
    return {k: v.to(model.device, model.dtype if v.is_floating_point() else None) for k, v in inputs.items()}


@torch.no_grad()
def answer_of(model: Any, processor: Any, sample: Sample, inputs: dict[str, Tensor], most: int) -> Tensor:
    """[A] ids of the sample's answer and the end token; without one, of what the model says (greedy, at most so many tokens)."""
    if sample.answer is None:
        said: Tensor = model.generate(**inputs, do_sample=False, max_new_tokens=most)
        return said[0, inputs["input_ids"].shape[1] :]
    ids = processor.tokenizer(sample.answer, add_special_tokens=False).input_ids[: most - 1]
    return torch.tensor([*ids, processor.tokenizer.eos_token_id], device=model.device)


def continued(inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
    """The same inputs with text `ids` [A] behind the prompt."""
    more = {"input_ids": ids[None], "attention_mask": torch.ones_like(ids)[None], "mm_token_type_ids": 0 * ids[None]}
    return {k: torch.cat([v, more[k].to(v.dtype)], 1) if k in more else v for k, v in inputs.items()}
