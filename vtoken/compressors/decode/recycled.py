"""Recycled Attention: between steps that read everything, what the last of them attended to is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch.nn.functional import cosine_similarity

from vtoken.stages.budget import Budget
from vtoken.stages.decode import Choice, DecodeStage, DecodeStep, by_row, highest, with_whole_rows


class Recycled(DecodeStage):
    """At one generated token in `every`, a layer reads everything, and each key head remembers the `keep` visual tokens
    that it attends to most, by the highest attention among its query heads. At the tokens in between it reads only
    these. The first token after a prompt, a turn or drafts reads everything.

    With `similarity`, the layer also reads everything where a token's queries differ too much from those of the last
    token that did: the cosine of the two, mean over the heads, is below `similarity`. This is checked every `check`
    tokens, row by row; the host then waits for the device.

    Paper: https://arxiv.org/abs/2411.05787
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2411.05787"
    deviations: ClassVar[str] = (
        "Visual tokens alone are chosen and count in `keep`; text and what was generated are always read. The first "
        "generated token reads everything and chooses; the paper chooses by the last prompt token. The authors' code "
        "could not be read: that cosines are averaged over the heads of a layer, and `check`, are this project's."
    )

    keep: Budget = Field(default=Budget(4096), description="visual tokens of each image that a generated token reads")
    every: int = Field(default=50, ge=1, description="generated tokens of which one reads everything")
    similarity: float | None = Field(
        default=None, ge=-1, le=1, description="cosine of queries below which everything is read; 0.8 in the paper"
    )
    check: int = Field(default=5, ge=1, description="tokens after which `similarity` is looked at, again and again")

    def choose(self, step: DecodeStep) -> Choice | None:
        counts = tuple(min(n, k) for n, k in zip(step.lengths, step.budgets, strict=True))
        since, memory = step.since("chosen"), step.memory
        full = [True] * len(counts) if since is None else self._due(step, since)
        if not any(full):
            return Choice(memory["index"], counts)
        step.mark("chosen")
        new = {"index": highest(step.of_visual(step.logits().softmax(-1).amax(2)), counts)}
        if self.similarity is not None:
            new |= {"query": step.queries, "age": torch.zeros(len(counts), dtype=torch.long)}
        if all(full):
            memory.update(new)
            return None
        memory.update({name: by_row(full, x, memory[name]) for name, x in new.items()})
        return with_whole_rows(step, memory["index"], counts, full)

    def _due(self, step: DecodeStep, since: int) -> list[bool]:
        """Which rows read everything."""
        if self.similarity is None:
            return [since >= self.every] * len(step.lengths)
        memory = step.memory
        memory["age"] = memory["age"] + 1
        ages = memory["age"].tolist()
        due = [age >= self.every for age in ages]
        if any(age % self.check == 0 for age in ages):
            alike = cosine_similarity(step.queries.float(), memory["query"].float(), dim=-1).mean(1).tolist()
            looked = [age % self.check == 0 and a < self.similarity for age, a in zip(ages, alike, strict=True)]
            due = [a or b for a, b in zip(due, looked, strict=True)]
        return due

    def visual_read(self, layer: int, acting: Sequence[int], images: Sequence[int], step: int) -> int | None:
        if self.similarity is not None:
            return None
        return self.budget(images) if step % self.every else sum(images)

    def read_to_choose(self, layer: int, acting: Sequence[int], prompt: int, images: Sequence[int], step: int) -> float:
        """All keys once more, without what `similarity` asks for."""
        return 0 if step % self.every else (prompt + step + 1) / 2
