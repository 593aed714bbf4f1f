"""What is installed on a model, and where, in lines to read."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from torch import nn


def described(model: nn.Module, installed: Sequence[tuple[Any, str]]) -> list[str]:
    """One line per hook class or attribute: the modules it is on, equal layers as ranges (`layers.0-31`)."""
    names = {id(module): name or type(module).__name__ for name, module in model.named_modules()}
    found: dict[str, dict[str, None]] = {}
    for target, what in installed:
        found.setdefault(what, {})[names.get(id(target), type(target).__name__)] = None
    return [f"{what}: {', '.join(ranges(list(where)))}" for what, where in found.items()]


def ranges(names: Sequence[str]) -> list[str]:
    """Module names; those that differ in nothing but their first number become one."""
    numbers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+", name)
        numbers.setdefault(re.sub(r"(?<=\.)\d+", "#", name, count=1), []).append(int(number[0]) if number else -1)
    return [pattern.replace("#", spans(sorted(each))) for pattern, each in numbers.items()]


def spans(numbers: Sequence[int]) -> str:
    """[0, 1, 2, 5] -> 0-2,5."""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
