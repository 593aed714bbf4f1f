"""The reference VLMs, which read coloured digits, and their held-out questions.

Importing this needs neither torch nor transformers. The models are stock: `load()` is two calls of `from_pretrained`.
tiny-llava is part of the package; the others lie in the repository, which also holds how all of them are trained: see
reference_models/.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from vtoken.errors import ConfigError, unknown

KINDS = ("digit", "color", "count", "read", "exists", "next")
_HERE = Path(__file__).parent
_REPOSITORY = _HERE.parents[2] / "reference_models"
_NAMES = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")


@dataclass(frozen=True)
class Question:
    """One held-out question. `boxes` are (left, top, right, bottom) of all digits in the picture, in pixels."""

    image: Path
    question: str
    answer: str
    kind: str
    boxes: tuple[tuple[int, int, int, int], ...]


def names() -> tuple[str, ...]:
    """Names of the reference models."""
    return _NAMES


def path(name: str = "tiny-llava") -> Path:
    """Folder of a reference model: in the package, in the checkout it is installed from, or in one that is the working
    directory.

    Raises:
        ConfigError: there is no such model (suggests the nearest name), or it is not in the installed package (says how
            to get it).
    """
    if name not in _NAMES:
        raise ConfigError(unknown("reference model", name, _NAMES))
    places = [_HERE / name, _REPOSITORY / name, Path("reference_models", name).absolute()]
    found = next((place for place in places if place.is_dir()), None)
    if found is None:
        raise ConfigError(
            f"{name} lies in reference_models/ of vtoken's repository and is not part of the installed package; run "
            "the command in the root of a checkout, or give the model's folder"
        )
    return found


def needles() -> Any:
    """The module that draws questions about digits in one frame of many. It lies in the repository, beside the model
    that can be asked them.

    Raises:
        ConfigError: it is not in the installed package (says how to get it).
        ImportError: what it draws with is not installed.
    """
    for folder in (_REPOSITORY, Path("reference_models").absolute()):
        if (folder / "needle.py").is_file():
            if str(folder.parent) not in sys.path:
                sys.path.append(str(folder.parent))
            return import_module("reference_models.needle")
    raise ConfigError(
        "the needle task draws its frames with reference_models/ of vtoken's repository, which is not part of the "
        "installed package; run the command in the root of a checkout"
    )


def load(
    name: str = "tiny-llava", dtype: Any = None, device: Any = None, attn_implementation: str | None = None
) -> tuple[Any, Any]:
    """The stock model in eval mode and its processor, which pads on the left and needs no torchvision (without it,
    Qwen's takes no videos)."""
    from vtoken.evals.shared import torchvision

    torchvision.check()
    from transformers import AutoModelForImageTextToText

    from vtoken.evals.shared.bars import terminal_only

    folder = path(name)
    asked = {"dtype": dtype, "attn_implementation": attn_implementation}
    with terminal_only(shown=False):  # They load in a moment.
        model = AutoModelForImageTextToText.from_pretrained(folder, **{k: v for k, v in asked.items() if v is not None})
    return (model.to(device) if device is not None else model).eval(), processor(folder)


def processor(folder: Path) -> Any:
    """The processor saved in a folder, with the Pillow image backend."""
    from vtoken.evals import processors

    return processors.load(folder, pillow=True)


def questions(limit: int | None = None, folder: Path | None = None) -> list[Question]:
    """The held-out set, or its first `limit` questions; questions about one picture follow each other, one of each
    kind.

    `folder`: another set that `reference_models.heldout` wrote.
    """
    folder = _HERE / "glyph-qa" if folder is None else folder
    rows = (folder / "questions.jsonl").read_text().splitlines()[:limit]
    return [
        Question(
            folder / row["image"],
            row["question"],
            row["answer"],
            row["kind"],
            tuple(tuple(box) for box in row["boxes"]),
        )
        for row in map(json.loads, rows)
    ]


def prompt(processor: Any, question: Question | str) -> str:
    """The question after its picture, through the chat template, ready for an answer."""
    text = question if isinstance(question, str) else question.question
    message = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}
    return processor.apply_chat_template([message], add_generation_prompt=True)


def answers(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    batch_size: int = 16,
    max_new_tokens: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> list[str]:
    """Greedy answers in left-padded batches. Calls `model.generate` and nothing else; `progress(done, total)` is called
    after every batch."""
    import torch

    from vtoken.evals.processors import apply
    from vtoken.evals.shared.media import still

    said: list[str] = []
    for start in range(0, len(questions), batch_size):
        rows = questions[start : start + batch_size]
        images, texts = [still(row.image) for row in rows], [prompt(processor, row) for row in rows]
        inputs = apply(processor, "the questions' pictures", model, images=images, text=texts, padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        said += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        if progress:
            progress(len(said), len(questions))
    return said


def score(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(right, total) of every kind: exact match, white space aside."""
    if len(questions) != len(answers):
        raise ValueError(f"{len(questions)} questions but {len(answers)} answers")
    table: dict[str, tuple[int, int]] = {}
    for question, answer in zip(questions, answers, strict=True):
        right, total = table.get(question.kind, (0, 0))
        table[question.kind] = (right + (answer.split() == question.answer.split()), total + 1)
    return table
