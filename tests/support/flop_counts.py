"""FLOPs as torch counts them, and the stages whose account is held against that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from vtoken.stages import Fact, Pruner, Site, Stage

CLOSE = 0.005
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mha": {"num_key_value_heads": 4},
    "wide heads": {"head_dim": 16},
    "siglip": {"tower": "siglip"},
    "qwen2": {"text": "qwen2"},
    "qwen3": {"text": "qwen3", "head_dim": 16},
    "gemma": {"text": "gemma", "head_dim": 16},
    "mistral, sliding": {"text": "mistral", "sliding_window": 12},
}


@dataclass(frozen=True)
class Pipe:
    """What `vtoken.config.load` returns, as far as the account reads it."""

    stages: tuple[Stage, ...]
    name: str = "pipe"
    newline: str = "keep_if_row_has_token"
    anyres: str = "model"
    min_visual_tokens: int = 0
    contrast: None = None
    written: str = ""
    contrast: Any = None


class Inside(Pruner):
    """Cuts inside the tower, after two of its layers (of four; CLIP's features leave the third)."""

    site: ClassVar[Site] = "encoder"

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("cls_attention"), Fact("features"))

    def layers(self, depth: int) -> tuple[int, ...]:
        return (0, 1)


class Quiet(Inside):
    """The same without asking for anything."""

    def needs(self) -> tuple[Fact, ...]:
        return ()


class Blind(Pruner):
    """Cuts before two decoder layers, whatever is there."""

    site: ClassVar[Site] = "decoder"

    def layers(self, depth: int) -> tuple[int, ...]:
        return (1, depth - 1)


class Deep(Blind):
    """The same by attention."""

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("last_query_attention"),)


class Exit(Stage):
    """Drops every visual token before a decoder layer."""

    site: ClassVar[Site] = "decoder"
    kind: ClassVar[Any] = "compressor"
    layer: int

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def expected_counts(self, lengths: Any, parts: Any, row: Any, layer: int | None = None) -> tuple[int, ...]:
        return (0,) * len(lengths)


def _cpu_sdpa(q: Any, k: Any, v: Any, *rest: Any, out_val: Any = None, **more: Any) -> Any:
    """torch has no count for sdpa on the CPU; K and V heads are expanded, as every query head does its own products."""
    q, k, v = (t.shape if torch.is_tensor(t) else t for t in (q, k, v))
    return sdpa_flop_count(q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:]))


def _grouped(x: Any, experts: Any, *rest: Any, out_val: Any = None, **more: Any) -> int:
    """Nor for the matrices of experts: every row of x [rows, in] meets one of `experts` [experts, in, out]."""
    (rows, width), out = (
        (x.shape if torch.is_tensor(x) else x),
        (experts.shape if torch.is_tensor(experts) else experts),
    )
    return int(2 * rows * width * out[-1])


def _solved(a: Any, b: Any, *rest: Any, out_val: Any = None, **more: Any) -> int:
    """Nor for triangular systems a x = b of a [..., n, n] and b [..., n, d]: as multiplying by the inverse of a, which
    older versions of the gated delta rule do."""
    a, b = (t.shape if torch.is_tensor(t) else t for t in (a, b))
    return int(2 * prod(b) * a[-1])


SDPA = {
    torch.ops.aten.linalg_solve_triangular: _solved,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _cpu_sdpa,
    torch.ops.aten._grouped_mm: _grouped,
}


def counted(call: Callable[[], object]) -> int:
    """FLOPs while `call` runs."""
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=SDPA) as counter:
        call()
    return int(counter.get_total_flops())


def part(counter: FlopCounterMode, module: torch.nn.Module, name: str | tuple[str, ...]) -> Any:
    """Counts of a module, whose name ends like this, or like one of these; generate calls the tower and the projector as
    roots, which are named by their class."""
    counts = counter.get_flop_counts()
    root = type(module).__name__
    return counts[root if root in counts else next(key for key in counts if key.endswith(name))]
