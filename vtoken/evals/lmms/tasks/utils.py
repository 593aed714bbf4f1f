"""The functions that the YAML files here name."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from PIL import Image

from vtoken.evals import reference
from vtoken.evals.shared.media import still

FOLDER = Path(reference.__file__).parent / "glyph-qa"
KINDS = ("color", "next")  # of question, that name a digit: so it is known which pictures do not show it
STILL = 2  # frames in a row that are the same, as many as Qwen merges
NEEDLES = 20  # per depth


def pictures(doc: dict[str, Any]) -> list[Image.Image]:
    """The pictures of a document, RGB."""
    names = doc["images"] if "images" in doc else [doc["image"]]
    return [still(FOLDER / name) for name in names]


def video_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The question after a video that shows one picture after the other."""
    return _messages(pictures(doc), doc)


def needle_messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
    """The question after a video, one of whose frames shows digits."""
    return _messages(reference.needles().needle(doc["length"], doc["depth"], doc["number"]).frames, doc)


def _messages(frames: Iterable[Image.Image], doc: dict[str, Any]) -> list[dict[str, Any]]:
    repeated = [frame for frame in frames for _ in range(STILL)]
    content = [{"type": "video", "url": repeated}, {"type": "text", "text": doc["question"]}]
    return [{"role": "user", "content": content}]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """1 for the words of the answer and nothing else, 0 otherwise."""
    return {"glyph_accuracy": float(results[0].split() == doc["answer"].split())}


def _needles(docs: Any, length: int) -> Any:
    """Needles of a length, as many at every depth; frames are drawn when they are asked for. `docs` are not used."""
    from datasets import Dataset

    source = reference.needles()
    found = []
    for number, depth in product(range(NEEDLES), source.DEPTHS):
        drawn = source.needle(length, depth, number)
        place = {"length": length, "depth": depth, "number": number}
        found.append({**place, "question": drawn.question, "answer": drawn.answer})
    return Dataset.from_list(found)


needles_8, needles_16, needles_32, needles_64 = (partial(_needles, length=length) for length in (8, 16, 32, 64))


def _composed(docs: Any, count: int) -> Any:
    """Every question that names a digit about `count` pictures: its own, at each place in turn, and others that do not
    show that digit."""
    from datasets import Dataset

    rows = list(docs)
    digits = {row["image"]: set(row["answer"].split()) for row in rows if row["kind"] == "read"}
    names = list(digits)
    found: list[dict[str, Any]] = []
    for row in rows:
        if row["kind"] not in KINDS:
            continue
        digit = row["question"].rstrip("?").split()[-1]
        start = names.index(row["image"])
        others = [name for name in names[start + 1 :] + names[:start] if digit not in digits[name]][: count - 1]
        place = len(found) % count
        images = [*others[:place], row["image"], *others[place:]]
        found.append({"images": images, **{key: row[key] for key in ("question", "answer", "kind")}})
    return Dataset.from_list(found)


pairs, videos = (partial(_composed, count=count) for count in (2, 4))
