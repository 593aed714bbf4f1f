"""Choices of cached tokens, one loop per sentence, and a stock model that reads what they say.

A `Literal` is about one row without padding: which slots hold visual tokens, how many of them are read, and the rule.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import oracle
import tiny
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "known_decode"
Lists = list[set[int]]  # visual slots per key head


class Literal:
    """Attributes:
    budget: visual tokens that are read; inner: layer -> visual slots and budget from there on; read: per generated token, slots that a key head reads, summed over layers.
    """

    def __init__(self, stage: Any, visual: Sequence[int], budget: int, attending: Sequence[int], depth: int) -> None:
        self.stage, self.visual, self.budget = stage, list(visual), budget
        self.attending = list(attending)
        self.acting = [k for k in attending if k in stage.layers(depth)]
        self.inner: dict[int, tuple[list[int], int]] = {}
        self.held: dict[Any, Any] = {}
        self.step, self.read = -1, list[int]()

    def attend(
        self, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, scaling: Any = None, **kwargs: Any
    ) -> Any:
        layer, every = module.layer_idx, set(range(k.shape[2]))
        if q.shape[2] > 1:
            self.step, self.held = -1, {}
            return sdpa_attention_forward(module, q, k, v, mask, scaling=scaling, **kwargs)
        if layer == self.attending[0]:
            self.step += 1
            self.read.append(0)
            self.now = self.visual, self.budget
        for first, inner in self.inner.items():
            self.now = inner if layer >= first else self.now
        lists = None
        visual, budget = self.now
        if layer in self.acting and budget < len(visual):
            lists = getattr(self, self.stage.name)(layer, q[0, :, 0], k[0], scaling)
        groups, out = q.shape[1] // k.shape[1], torch.zeros(1, 1, q.shape[1], v.shape[3])
        for h in range(q.shape[1]):
            left_out = set() if lists is None else set(visual) - lists[h // groups]
            slots = sorted(every - left_out)
            scores = torch.stack([(q[0, h, 0] * k[0, h // groups, s]).sum() for s in slots]) * scaling
            out[0, 0, h] = scores.softmax(0) @ v[0, h // groups, slots]
        self.read[-1] += len(slots)
        return out, None

    def quest(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> Lists | None:
        stage, (visual, budget) = self.stage, self.now
        n = len(visual)
        full, groups = n // stage.size, len(q) // len(k)
        pages = [visual[i * stage.size : (i + 1) * stage.size] for i in range(full)]
        rest = set(visual[full * stage.size :])
        wanted = max(stage.least, math.ceil(budget / stage.size)) - bool(rest)
        if wanted >= full:
            return None
        if self.step % stage.every:
            return self.held[layer]
        out = []
        for g in range(len(k)):
            worth = []
            for page in pages:
                best = -math.inf
                part = stage.size // stage.chunks
                for c in range(stage.chunks):
                    keys = k[g, page[c * part : (c + 1) * part]]
                    for h in range(g * groups, (g + 1) * groups):
                        bound = sum(
                            max(float(x * lo), float(x * hi))
                            for x, lo, hi in zip(q[h], keys.amin(0), keys.amax(0), strict=True)
                        )
                        best = max(best, bound)
                worth.append(best)
            chosen = sorted(range(full), key=lambda i: -worth[i])[: max(0, wanted)]
            out.append(rest | {slot for i in chosen for slot in pages[i]})
        self.held[layer] = out
        return out

    def tidal(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> Lists | None:
        stage, groups, (visual, budget) = self.stage, len(q) // len(k), self.now
        before = [a for a in self.acting if a < layer]
        corrects = stage.correction is not None and before and before[-1] < stage.correction <= layer
        if before and not corrects and self.held["visual"] == visual:
            return self.held["choice"]
        self.held["visual"] = visual
        self.held["choice"] = [
            best({s: sum(float(q[h] @ k[g, s]) for h in range(g * groups, (g + 1) * groups)) for s in visual}, budget)
            for g in range(len(k))
        ]
        return None

    def recycled(self, layer: int, q: Tensor, k: Tensor, scaling: float) -> Lists | None:
        stage, groups, (visual, budget) = self.stage, len(q) // len(k), self.now
        if layer in self.held:
            age = self.step - self.held[layer]["at"]
            full = age >= stage.every
            if stage.similarity is not None and age % stage.check == 0:
                old = self.held[layer]["q"]
                alike = [float(a @ b / (a.norm() * b.norm())) for a, b in zip(q, old, strict=True)]
                full = full or sum(alike) / len(alike) < stage.similarity
            if not full:
                return self.held[layer]["choice"]
        maps = torch.stack([(k[h // groups] @ q[h] * scaling).softmax(0) for h in range(len(q))])
        lists = [
            best({s: max(float(maps[h, s]) for h in range(g * groups, (g + 1) * groups)) for s in visual}, budget)
            for g in range(len(k))
        ]
        self.held[layer] = {"at": self.step, "q": q.clone(), "choice": lists}
        return None


def best(scores: dict[int, float], count: int) -> set[int]:
    return set(sorted(scores, key=lambda s: -scores[s])[:count])


@contextmanager
def reading(model: Any, literal: Literal) -> Iterator[None]:
    """The model's decoder attends as the literal says."""
    AttentionInterface.register(NAME, literal.attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    config = model.get_decoder().config
    before = config._attn_implementation
    config._attn_implementation_internal = NAME
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def visual_slots(model: Any, row: dict[str, Tensor], kept: Sequence[Tensor] | None = None, p: Any = None) -> list[int]:
    """Slots of the visual tokens of a prompt of one row, all of them or those that were kept of each image."""
    p = oracle.prompt(model, row) if p is None else p
    held = p.mask if kept is None else oracle.keep_mask(p, kept)
    return p.visual[0][held[0]].nonzero()[:, 0].tolist()


def literal(model: Any, row: dict[str, Tensor], stage: Any, budget: int, kept: Any = None, p: Any = None) -> Literal:
    """The rule of a stage for a prompt of one row."""
    attending = tiny.family(model).attending
    return Literal(stage, visual_slots(model, row, kept, p), budget, attending, len(model.get_decoder().layers))
