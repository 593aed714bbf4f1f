"""Modules for `learned_compressor`, and files of their weights."""

from __future__ import annotations

import atexit
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from vtoken.stages import Layout, TokenModule

_FOLDER = TemporaryDirectory()
atexit.register(_FOLDER.cleanup)


class Halves(TokenModule):
    """Every other token, through a matrix, plus the mean of all."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.takes = self.makes = width
        self.mix = nn.Linear(width, width)

    def forward(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        return self.mix(tokens[::2]) + tokens.mean(0), layout._replace(places=layout.places[::2].contiguous())

    def count(self, tokens: int) -> int:
        return -(-tokens // 2)


class Queries(TokenModule):
    """Learned queries attend to the encoder's features."""

    reads = "features"

    def __init__(self, width: int, out: int, queries: int = 3) -> None:
        super().__init__()
        self.takes, self.makes = width, out
        self.queries, self.out = nn.Parameter(torch.randn(queries, width)), nn.Linear(width, out)

    def forward(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        return self.out((self.queries @ tokens.T).softmax(-1) @ tokens), layout.spread(len(self.queries))

    def count(self, tokens: int) -> int:
        return len(self.queries)


class Liar(Halves):
    """Returns fewer tokens than it said."""

    def count(self, tokens: int) -> int:
        return tokens // 2 + 1


class Backwards(Halves):
    """Tells the places in the wrong order."""

    def forward(self, tokens: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
        made, where = super().forward(tokens, layout)
        return made, where._replace(places=where.places.flip(0))


@cache
def options(cls: type[TokenModule] = Halves, width: int = tiny.TEXT["hidden_size"], seed: int = 0, **more: Any) -> dict:
    """Options of the stage for a module with random weights."""
    torch.manual_seed(seed)
    path = Path(_FOLDER.name) / f"{cls.__name__}-{width}-{seed}-{len(more)}.safetensors"
    save_file(cls(width, **more).state_dict(), path, {"config": json.dumps({"width": width, **more})})
    return {"module": f"token_modules:{cls.__name__}", "weights": str(path)}
