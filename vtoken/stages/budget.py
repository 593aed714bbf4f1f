"""How many tokens to keep: `64`, `25%`, `{total: 640}`, `{per_frame: 32}` or `{per_crop: 64}`, turned into counts. A
share is rounded to the nearest count. `{per_frame: 32, key_weight: 4}` gives key frames more than the others."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from math import ceil
from numbers import Integral
from typing import Any, TypeGuard

import torch
from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

_HELP = (
    "write a count per image (64), a share (25%), or a count per sample ({total: 640}), frame or crop "
    "({per_frame: 32}, {per_crop: 64})"
)
PER_SEGMENT = ("per_frame", "per_crop")
_FORMS = [("total",), ("per_frame",), ("per_crop",), ("per_frame", "key_weight")]  # keys of the mappings
_LEAST = {"key_weight": 2}


def _whole(value: Any) -> TypeGuard[int]:
    """Whether the value is an integer, of Python or numpy."""
    return isinstance(value, Integral) and not isinstance(value, bool)


class Budget:
    """A validated budget. Build it with `Budget(64)`, `Budget("25%")`, `Budget({"total": 640})` or
    `Budget({"per_frame": 32})`, `Budget({"per_frame": 32, "key_weight": 4})`.

    Exactly one of `tokens` (per image), `share` (a Fraction in (0, 1]) and `total` (per batch row) is set. With `per`
    ("per_frame" or "per_crop"), `tokens` counts for every frame of a video, or every crop of an anyres image. An image
    with a single frame (or crop) is one segment. With `key_weight` (at least 2) the sum over the frames of a video
    stays the same, and a key frame gets that many times as much as another frame (see `counts`).

    Raises:
        ValueError: for anything else, floats included: `1` and `1.0` would mean different things.
    """

    tokens: int | None = None
    share: Fraction | None = None
    total: int | None = None
    per: str | None = None
    key_weight: int | None = None

    def __init__(self, value: int | str | dict[str, int] | Budget) -> None:
        found: dict[str, Any]
        if isinstance(value, Budget):
            found = vars(value)
        elif _whole(value):
            found = {"tokens": int(value)}
        elif isinstance(value, str) and re.fullmatch(r"[0-9]+(\.[0-9]+)?%", value):
            found = {"share": Fraction(value[:-1]) / 100}
        elif isinstance(value, dict) and set(value) in map(set, _FORMS) and all(map(_whole, value.values())):
            found = {}
            for key, count in value.items():
                found |= {"per": key, "tokens": int(count)} if key in PER_SEGMENT else {key: int(count)}
            if found.get("key_weight", 2) < _LEAST["key_weight"]:
                raise ValueError(f"keep: {value}: key frames with a key_weight below 2 get no more than others")
        else:
            raise ValueError(f"keep: {reprlib.repr(value)} is not a budget; {_HELP}")
        if not 0 < found.get("share", 1) <= 1:
            raise ValueError(f"keep: {value} must be above 0% and at most 100%")
        if any(n is not None and n < 1 for n in (found.get("tokens"), found.get("total"))):
            raise ValueError(f"keep: {value!r} must keep at least 1 token")
        vars(self).update(found)

    def counts(
        self, lengths: Sequence[int], row: Sequence[int], weight: Sequence[float] | None = None
    ) -> tuple[int, ...]:
        """Tokens to keep of every image.

        Args:
            lengths: tokens per image (with `per`: per segment) that arrive at the stage.
            row: batch row of each image. The images of a row divide `total` in proportion to their lengths (largest
                remainder, ties to the earlier image).
            weight: with `key_weight`, the weight of each segment; `row` is then the image of each segment. The segments
                of an image divide `tokens` times their number in proportion, as far as their lengths allow.

        Returns:
            One count per image: at least 1 (0 for an image without tokens), at most its length. A share is rounded to
                the nearest, halves down.
        """
        if weight is not None:
            wanted = self._weighed(lengths, row, weight)
        elif self.tokens is not None:
            wanted = [self.tokens] * len(lengths)
        elif self.share is not None:
            wanted = [ceil(n * self.share - Fraction(1, 2)) for n in lengths]
        else:
            wanted = self._split(lengths, row)
        return tuple(min(max(1, k), n) for k, n in zip(wanted, lengths, strict=True))

    def _weighed(self, lengths: Sequence[int], image: Sequence[int], weight: Sequence[float]) -> list[int]:
        assert self.tokens is not None
        out = [0] * len(lengths)
        for i in {owner for owner, n in zip(image, lengths, strict=True) if n}:
            segments = [s for s, owner in enumerate(image) if owner == i and lengths[s]]
            sizes = [lengths[s] for s in segments]
            k = min(self.tokens * len(segments), sum(sizes))
            each = torch.tensor([weight[s] for s in segments], dtype=torch.float64)
            for s, count in zip(segments, apportion(each * (k / each.sum()), sizes, k), strict=True):
                out[s] = count
        return out

    def _split(self, lengths: Sequence[int], row: Sequence[int]) -> list[int]:
        assert self.total is not None
        out = [0] * len(lengths)
        for r in set(row):
            images = [i for i, owner in enumerate(row) if owner == r and lengths[i]]
            available = sum(lengths[i] for i in images)
            total = min(self.total, available)
            for i in images:
                out[i] = total * lengths[i] // available
            left = total - sum(out[i] for i in images)
            for i in sorted(images, key=lambda i: (-(total * lengths[i] % available), i))[:left]:
                out[i] += 1
            # Every image keeps at least one token, taken from the largest counts, so the total stays the same.
            for i in images:
                largest = max(images, key=lambda j: out[j])
                if not out[i] and out[largest] > 1:
                    out[largest] -= 1
                    out[i] = 1
        return out

    def of_each(self, example: str) -> Budget:
        """This budget, which must count per picture: stages that act before or inside the vision tower know of nothing
        else.

        Raises:
            ValueError: it counts per prompt, frame or crop; `example` says what to write.
        """
        if self.total is not None or self.per is not None:
            raise ValueError(
                f"keep: {self.plain()} cannot be had before the visual tokens are there, where nothing tells what "
                f"belongs to one prompt, frame or crop; write {example}, or a share of them (25%)"
            )
        return self

    def of_images(self, where: str) -> Budget:
        """This budget, which must not count per frame or crop: the stage, acting `where`, does not know them.

        Raises:
            ValueError: it counts per frame or crop; says what to write.
        """
        if self.per is not None:
            raise ValueError(f"{self.per} cannot be had {where}; take a count, a share or {{total: 640}}")
        return self

    def plain(self) -> int | str | dict[str, int]:
        """The YAML form."""
        if self.tokens is not None and self.key_weight is not None:
            return {"per_frame": self.tokens, "key_weight": self.key_weight}
        if self.tokens is not None:
            return self.tokens if self.per is None else {self.per: self.tokens}
        if self.total is not None:
            return {"total": self.total}
        assert self.share is not None
        percent = self.share * 100
        return f"{Decimal(percent.numerator) / percent.denominator:f}%"

    def __repr__(self) -> str:
        return f"Budget({self.plain()!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Budget) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash(repr(self))

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(
            cls, serialization=core_schema.plain_serializer_function_ser_schema(cls.plain)
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        return {
            "description": "tokens to keep: a count per image, a share of them, or a count per sample, frame or crop",
            "anyOf": [
                {"type": "integer", "minimum": 1},
                {"type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?%$", "examples": ["25%"]},
                *(
                    {
                        "type": "object",
                        "properties": {key: {"type": "integer", "minimum": _LEAST.get(key, 1)} for key in keys},
                        "required": list(keys),
                        "additionalProperties": False,
                    }
                    for keys in _FORMS
                ),
            ],
        }


def apportion(wanted: torch.Tensor, lengths: Sequence[int], k: int) -> list[int]:
    """Divides k tokens among frames of these lengths: each gets between 1 and its length, as close to `wanted` [frames]
    as that allows; ties to the earlier frame. If k is below the number of frames, k of them get 1."""
    frame = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    nth = torch.cat([torch.arange(n) for n in lengths])
    lacking = torch.where(nth == 0, torch.inf, wanted[frame] - nth)
    if k < len(lengths):
        lacking = torch.where(nth == 0, wanted[frame], -torch.inf)
    given = frame[lacking.argsort(descending=True, stable=True)[:k]]
    return torch.bincount(given, minlength=len(lengths)).tolist()
