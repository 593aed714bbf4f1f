"""Which key heads stream, by a table of gates: the options that stages share, and the choice."""

from __future__ import annotations

from functools import cached_property
from typing import Self

from pydantic import Field, field_validator, model_validator

from vtoken.compressors import _duo
from vtoken.stages import NAMES_FILE, Stage


class StreamingHeads(Stage):
    """Mixin for stages in which some key heads stream: options, checks and choice."""

    gates: _duo.Gates | str | None = Field(
        default=None,
        description="per decoder layer, one number per key head: low ones stream; or a file of them, .json or .tsv",
        json_schema_extra=NAMES_FILE,
    )
    sparsity: float = Field(default=0.5, ge=0, le=1, description="share of key heads that stream, given gates")

    @field_validator("gates")
    @classmethod
    def _readable(cls, gates: _duo.Gates | str | None) -> _duo.Gates | str | None:
        if isinstance(gates, str):
            _duo.read(gates)
        elif gates is not None:
            _duo.check(gates, "gates")
        return gates

    @model_validator(mode="after")
    def _of_gates(self) -> Self:
        if self.gates is None and self.sparsity != type(self).model_fields["sparsity"].default:
            raise ValueError(f"sparsity {self.sparsity:g} needs gates; without them all heads stream")
        return self

    @cached_property
    def table(self) -> _duo.Gates | None:
        """The gates, from the options or the file, read once: later changes to the file do not reach a wrapped
        model."""
        return _duo.read(self.gates) if isinstance(self.gates, str) else self.gates

    def incompatibility(self, depth: int, width: int) -> str:
        gates = self.table
        if gates is None or len(gates) == depth:
            return ""
        return self._other(f"{len(gates)} decoder layers", depth)

    def heads_incompatibility(self, heads: int, key_heads: int, width: int) -> str:
        gates = self.table
        if gates is None or len(gates[0]) == key_heads:
            return ""
        return self._other(f"{len(gates[0])} key heads in a layer", key_heads)

    def _other(self, theirs: str, here: int) -> str:
        of = f"the gates {self.gates!r}" if isinstance(self.gates, str) else "gates"
        return f"{of} are for {theirs}, this model has {here}; learn them on it, or leave them out"

    def streams(self, layer: int) -> tuple[bool, ...] | None:
        """Which key heads of a layer stream; None means all of them."""
        if self.table is None:
            return None
        return tuple((layer, h) in self._streaming for h in range(len(self.table[layer])))

    @cached_property
    def _streaming(self) -> frozenset[tuple[int, int]]:
        """(layer, key head) of all that stream: those with the lowest gates of all layers, ties to the earlier head."""
        order = sorted((gate, k, h) for k, row in enumerate(self.table or ()) for h, gate in enumerate(row))
        return frozenset((k, h) for _, k, h in order[: int(self.sparsity * len(order) + 0.5)])
