"""lmms-eval's task manager and evaluator, called so that nothing stale, retried or half-loaded ends up in a number."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any

import torch.distributed as dist
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError

from vtoken.errors import UnsupportedError, VtokenError
from vtoken.evals.lmms.model import VtokenModel
from vtoken.evals.lmms.suites import KNOWN, known_to

TASKS = Path(__file__).parent / "tasks"


@dataclass(frozen=True)
class Leaf:
    """One task without parts, after one run.

    Attributes:
        metrics: every number its scorer gave for all documents.
        samples: one per document, in order, as lmms-eval logs them.
        config: of the task, as plain data.
        higher_is_better: metric -> whether.
    """

    metrics: dict[str, float]
    samples: tuple[dict[str, Any], ...]
    config: dict[str, Any]
    higher_is_better: dict[str, bool]

    def options(self) -> dict[str, Any]:
        """What a reader needs to know of the task: version, data and generation."""
        keys = ("dataset_path", "dataset_name", "test_split", "num_fewshot", "generation_kwargs")
        found = {key: self.config.get(key) for key in keys if self.config.get(key) is not None}
        metadata = self.config.get("metadata")
        version = metadata.get("version") if isinstance(metadata, dict) else None
        return json.loads(json.dumps({**found, "version": version}, default=str))


@dataclass(frozen=True)
class Scored:
    """One task or group after one run.

    Attributes:
        metric: the number reported, and `value` what it is; None where the scorer gives none.
        leaves: tasks of the group by name, else the task itself.
    """

    metric: str | None
    value: float | None
    leaves: dict[str, Leaf]

    @property
    def hash(self) -> str:
        """sha256 over the documents in order: another one means other data or another limit."""
        digest = hashlib.sha256()
        for leaf in self.leaves.values():
            digest.update("".join(sample["doc_hash"] for sample in leaf.samples).encode())
        return digest.hexdigest()


class Harness:
    """Tasks by name.

    Tasks are loaded anew for every run: some scorers count in variables of their module (OCRBench), and a task that is
    used twice would add the second run to the first.

    Args:
        tasks: names; lmms-eval's own are indexed only if one is not found elsewhere (10 s).
        folders: with YAML files of more tasks.
        profile: lmms-eval's model name whose prompts the tasks shall use, where they have several ("qwen_vl").

    Raises:
        ConfigError: a name that is no task.
        VtokenError: a task that cannot be loaded, before anything is asked.
        UnsupportedError: a task that is not answered by generating text.
    """

    def __init__(self, tasks: Sequence[str], folders: Sequence[Path] = (), profile: str | None = None) -> None:
        missing = [str(folder) for folder in folders if not folder.is_dir()]
        if missing:
            raise VtokenError(f"no folder {missing[0]!r} to include tasks from")
        places = {"include_path": [str(folder) for folder in (TASKS, *folders)], "model_name": profile or "vtoken"}
        self.manager = TaskManager(include_defaults=False, **places)
        if not set(tasks) <= set(self.manager.all_tasks):
            self.manager = TaskManager(**places)
        known_to(self.manager.all_tasks, tasks)
        self.tasks = list(tasks)
        for leaf, task in [found for name in tasks for found in self._leaves(name)]:
            kind = task.get_config("output_type")
            if kind != "generate_until":
                raise UnsupportedError(
                    f"task {leaf} is of type {kind}; only tasks that are answered by generating text once "
                    "(generate_until) are served"
                )

    def _leaves(self, name: str) -> list[tuple[str, Any]]:
        """Tasks of the group by name, else the task itself."""
        with _explained(name, "cannot be loaded"):
            return list(_leaves(get_task_dict([name], self.manager, "chat")))

    def run(self, model: VtokenModel, name: str, limit: int | None, folder: Path) -> Scored:
        """Asks the model everything and scores it.

        In a process group every process asks its share of the documents, and all of them have the whole score and all
        requests when it is over.

        Args:
            limit: first documents of every leaf only.
            folder: where scorers leave their files.

        Raises:
            VtokenError: the scorer failed, with its own reason.
            Whatever the model raises.
        """
        folder.mkdir(parents=True, exist_ok=True)
        # Some scorers print, and write into the folder they run in. The response cache stays off: it does not see the
        # pipeline of a model object, nor keeps what a request cost.
        with _explained(name, "cannot be scored"), contextlib.chdir(folder), contextlib.redirect_stdout(sys.stderr):
            found = simple_evaluate(
                model=model,
                model_args=model.about(),
                tasks=[name],
                task_manager=self.manager,
                batch_size=model.batch_size,
                limit=limit,
                bootstrap_iters=0,
                log_samples=True,
                use_cache=None,
                distributed_executor_backend="torchrun" if dist.is_initialized() else "accelerate",
            )
        with contextlib.suppress(OSError):  # Something was left in it, or another process was faster.
            folder.rmdir()
        shares = everyone(model.requests)
        if len(shares) > 1:
            model.requests[:] = sorted((r for share in shares for r in share), key=lambda r: (r.task, r.doc, r.repeat))
        # lmms-eval scores in the first process, and alone in the only one.
        return whoever(None if found is None else self._scored(name, found))

    def introduce(self, model: VtokenModel, cases: Sequence[Mapping[str, Any]]) -> None:
        """Makes documents known to a model that was not asked about them.

        Args:
            cases: `task` (a task without parts) and `doc` of each.
        """
        for name in self.tasks:
            for leaf, task in self._leaves(name):
                split = task.config.test_split if task.has_test_docs() else task.config.validation_split
                docs = [case["doc"] for case in cases if case["task"] == leaf]
                model.introduce(leaf, task.dataset, task.doc_to_messages, split, docs)

    def _scored(self, name: str, found: dict[str, Any]) -> Scored:
        leaves = {
            leaf: Leaf(
                numbers(found["results"][leaf]),
                _one_per_document(samples),
                # Functions of a task do not travel between processes.
                json.loads(json.dumps(found["configs"][leaf], default=str)),
                found["higher_is_better"][leaf],
            )
            for leaf, samples in found["samples"].items()
        }
        metric = _metric(name, leaves)
        own = numbers(found["results"].get(name, {}))
        each = [leaf.metrics[metric] for leaf in leaves.values() if metric in leaf.metrics]
        # A group without a number of its own: every leaf counts alike.
        value = own.get(metric, fmean(each) if each else None) if metric else None
        return Scored(metric, value, leaves)


def ranks() -> tuple[int, int]:
    """Number of this process under torchrun or accelerate, and how many there are."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def everyone(found: Any) -> list[Any]:
    """What each process of the process group gives, by rank; without a group, of this process alone."""
    if not dist.is_initialized():
        return [found]
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, found)
    return shares


def whoever(found: Any) -> Any:
    """The value of the one process that has it, in all of them; the others give None."""
    return next(share for share in everyone(found) if share is not None)


def numbers(given: dict[str, Any]) -> dict[str, float]:
    """Metric -> number, without what is none ("N/A", empty lists) and standard errors. Keys leave out the filter
    "none"."""
    found = {}
    for key, value in given.items():
        metric, _, chosen = key.partition(",")
        if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value) and "_stderr" not in metric:
            found[metric if chosen in ("", "none") else key] = float(value)
    return found


def _metric(name: str, leaves: dict[str, Leaf]) -> str | None:
    """The metric that is known for the task, else the first of its first leaf that is a number."""
    if name in KNOWN:
        return KNOWN[name].metric
    first = next(iter(leaves.values()), None)
    return next(iter(first.metrics), None) if first else None


def _one_per_document(samples: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """A task with several filters logs every document once per filter: the first stays. Several processes log one share
    each."""
    first = {sample["doc_id"]: sample for sample in reversed(samples)}
    return tuple(first[key] for key in sorted(first))


def _leaves(loaded: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for name, task in loaded.items():
        if isinstance(task, dict):
            yield from _leaves(task)
        else:
            yield str(name), task


@contextlib.contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Turns what a task raised when lmms-eval loaded it, or tried in vain to score it, into one sentence."""
    try:
        yield
        return
    except RetryError as error:  # lmms-eval tries loading and scoring five times and then hides why.
        cause = error.last_attempt.exception()
    except (ImportError, KeyError, OSError, AssertionError) as error:
        if what != "cannot be loaded":
            raise
        cause = error
    message = f"task {name} {what}: {type(cause).__name__}: {str(cause).strip() or 'no message'}"
    if type(cause).__name__ == "LocalTokenNotFoundError":
        message += "; lmms-eval asks the hub with a token even for public data: run `hf auth login`"
    elif isinstance(cause, ModuleNotFoundError):
        message += f"; pip install {cause.name}"
    raise VtokenError(message) from cause
