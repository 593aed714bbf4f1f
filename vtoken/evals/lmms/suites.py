"""Named lists of lmms-eval's tasks, and what has to be known about a task before it runs."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any

from vtoken.errors import ConfigError

# What imports an optional package -> how it is called where it is installed from.
PACKAGES = {"cv2": "opencv-python-headless", "av": '"av<16"', "decord": "decord"}


@dataclass(frozen=True)
class Task:
    """One of lmms-eval's tasks.

    Attributes:
        metric: the number that is reported, of those its scorer gives. OCRBench divides by 1,000, however many
            documents are asked.
        scale: what that number is when everything is right.
        document: where a document's own number is, if its scorer gives a mapping: under one key, or two that are equal
            when it is right.
        needs: packages that its scorer or its videos need beside lmms-eval's own.
        judge: whether a model behind an API scores it.
    """

    name: str
    metric: str
    scale: float = 1.0
    document: tuple[str, ...] = ("score",)
    needs: tuple[str, ...] = ()
    judge: bool = False


def document_score(name: str, given: Any) -> float | None:
    """A document's own number, from what the task's scorer gave for its metric; None where there is none."""
    if isinstance(given, bool | int | float):
        return float(given)
    keys = KNOWN[name].document if name in KNOWN else Task.document
    if not isinstance(given, Mapping) or not set(keys) <= set(given):
        return None
    values = [given[key] for key in keys]
    if len(values) == 2:
        return float(str(values[0]).strip().lower() == str(values[1]).strip().lower())
    return float(values[0]) if isinstance(values[0], bool | int | float) else None


KINDS = ("qa", "pairs", "video", "needle_8", "needle_16", "needle_32", "needle_64")
OWN = tuple(Task(f"vtoken_glyph_{kind}", "glyph_accuracy") for kind in KINDS)
SUITES: dict[str, tuple[Task, ...]] = {
    "smoke": OWN[:1],
    "pruning-suite": (
        Task("gqa", "exact_match"),
        Task("mmbench_en_dev_static", "gpt_eval_score", 100),
        Task("mme", "mme_perception_score", 2000),
        Task("pope", "pope_f1_score"),
        Task("scienceqa_img", "exact_match"),
        Task("vqav2_val_lite", "exact_match"),
        Task("textvqa_val", "exact_match"),
        Task("vizwiz_vqa_val", "exact_match"),
        Task("seedbench", "seed_image", document=("pred", "answer")),
        Task("mmmu_val", "mmmu_acc"),
    ),
    "pruning-suite-hires": (
        Task("docvqa_val", "anls"),
        Task("chartqa", "relaxed_overall"),
        Task("ocrbench", "ocrbench_accuracy"),
        Task("infovqa_val", "anls"),
        Task("vstar_bench", "vstar_overall_acc", 100),
        Task("hrbench4k", "average", document=("gpt_score",)),
        Task("refcoco_bbox_rec_val", "refcoco_ACC@0.5"),
    ),
    "pruning-suite-video": (
        Task("videomme", "videomme_perception_score", 100, ("pred_answer", "answer"), needs=("cv2", "av")),
        Task("mvbench", "mvbench_accuracy", 100, needs=("av",)),
        Task("longvideobench_val_v", "lvb_acc", document=("parsed_pred", "answer"), needs=("decord", "av")),
        Task("egoschema_subset", "score", document=("pred", "ground_truth"), needs=("av",)),
        Task("mlvu_dev", "mlvu_percetion_score", 100, ("pred_answer", "answer"), needs=("av",)),
    ),
    "pruning-suite-judge": (
        Task("mmvet", "gpt_eval_score", 100, judge=True),
        Task("mmbench_cn_dev", "gpt_eval_score", 100, judge=True),
    ),
}
KNOWN = {task.name: task for tasks in (OWN, *SUITES.values()) for task in tasks}


def expand(names: Sequence[str]) -> list[str]:
    """Task names, suites replaced by their tasks, each once."""
    given = [name.strip() for name in names if name.strip()]
    if not given:
        raise ConfigError(f"no task is given; write names of lmms-eval's tasks or one of {', '.join(SUITES)}")
    found = [task.name for name in given for task in SUITES.get(name, ())] + [n for n in given if n not in SUITES]
    order = list(dict.fromkeys(found))
    for name in order:
        _check(KNOWN.get(name))
    return order


def _check(task: Task | None) -> None:
    if task is None:
        return
    missing = [PACKAGES[name] for name in task.needs if find_spec(name) is None]
    if missing:
        raise ConfigError(f"task {task.name} needs a package that is not installed: pip install {' '.join(missing)}")
    if task.judge and not has_judge():
        raise ConfigError(
            f"task {task.name} is scored by a model behind an API: set OPENAI_API_KEY, or AZURE_API_KEY with "
            "API_TYPE=azure; without one lmms-eval gives every answer the score 0 or a random option"
        )


def has_judge() -> bool:
    """Whether a model behind an API can be asked to score."""
    return any(os.environ.get(name) for name in ("OPENAI_API_KEY", "AZURE_API_KEY"))


def known_to(every: Sequence[str], names: Sequence[str]) -> None:
    """Refuses names that the task manager does not list."""
    for name in names:
        if name not in every:
            close = get_close_matches(name, [*every, *SUITES], n=3)
            hint = f"; did you mean {', '.join(close)}?" if close else ";"
            raise ConfigError(
                f"unknown task {name!r}{hint} `lmms-eval tasks list` prints all; suites: {', '.join(SUITES)}"
            )
