"""The prompts of lmms-eval's tasks, without asking a model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms

from vtoken.errors import UnsupportedError
from vtoken.evals.lmms.harness import Harness
from vtoken.evals.lmms.prompts import Prompt, from_chat
from vtoken.evals.lmms.suites import expand


class Listener(lmms):
    """Looks like a model to lmms-eval, and keeps what it is asked."""

    is_simple = False
    batch_size = 1
    device = "cpu"

    def __init__(self, frames: int) -> None:
        super().__init__()
        self.frames = frames
        self.heard: list[tuple[Prompt, dict[str, Any]]] = []
        self.requests: list[Any] = []

    def about(self) -> dict[str, Any]:
        return {}

    def clean(self) -> None:
        """Nothing to free."""

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        for request in requests:
            _, messages, options, doc, task, split = request.args
            self.heard.append((from_chat(messages(self.task_dict[task][split][doc]), self.frames), dict(options)))
        return [GenerationResult("", TokenCounts(0, 0)) for _ in requests]

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        raise UnsupportedError("only tasks that are answered by generating text are served")

    generate_until_multi_round = loglikelihood


def prompts(tasks: Sequence[str], limit: int | None, frames: int) -> list[tuple[Prompt, dict[str, Any]]]:
    """What every task asks, and with which generation options.

    Raises:
        VtokenError: a task that is not there or cannot be loaded.
    """
    names = expand(tasks)
    listener, harness = Listener(frames), Harness(names)
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            harness.run(listener, name, limit, Path(folder))
    return listener.heard
