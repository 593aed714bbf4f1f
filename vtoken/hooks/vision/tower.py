"""The skeleton of hooks inside a vision tower: facts are read off chosen layers, stages decide between layers.

A subclass knows how values lie in the tower (padded crops, or one sequence of all images): it gathers live tokens, puts
back what a decision left, cuts arguments of later layers to them, and gives features their length after the tower.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vtoken.errors import UnsupportedError
from vtoken.hooks.state.checkpointing import check_replay
from vtoken.hooks.state.context import Context, by_layer
from vtoken.hooks.state.decide import decide
from vtoken.hooks.state.encoder_fact import substituted
from vtoken.hooks.state.live_tokens import skipped_entry
from vtoken.hooks.state.token_history import TokenHistory
from vtoken.hooks.state.trace import StageTrace
from vtoken.hooks.vision.encoder_facts import OF_LAYER, EncoderLayer, compute, projections
from vtoken.hooks.vision.pixel_stages import parted
from vtoken.hooks.vision.refill import Estimates, refill, without_refill
from vtoken.stages import Fact, Keep, Parts, Stage, VisualTokens


@dataclass(kw_only=True)
class TowerState(ABC):
    """State of one tower call.

    Attributes:
        history: what became of every token (padded towers: patch) of each image (crop).
        skipped: per image (crop), whether it keeps all; empty: none does. `skip_reason`: why no stage acts, or None.
        taps: q, k, v or qkv -> projection of the layer that runs now.
        resized: rasters of all pictures of the call, where any was made smaller; None where none was.
        entered: [ΣP, D] what the layer ahead of a refilling stage's cut was given; estimates: what that stage dropped.
        deep: for each tap of DeepStack, which tokens were left there, see `alive`.
        facts: for later stages, [ΣN, ...] (padded towers: [crops, patches, ...]), 0 at tokens that were dropped before.
        read: [ΣK, ...] values read off layers, and the `arrangement` of the live tokens then.
        memory: stage (by id) -> its `tokens.memory`; traces: an entry of every stage that acted so far.
    """

    history: TokenHistory
    skipped: tuple[bool, ...] = ()
    skip_reason: str | None = None
    taps: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[Fact, Tensor] = field(default_factory=dict)
    read: dict[Fact, tuple[Tensor, Any]] = field(default_factory=dict)
    memory: dict[int, dict[str, Any]] = field(default_factory=dict)
    traces: list[StageTrace] = field(default_factory=list)
    deep: list[Tensor | None] = field(default_factory=list)
    resized: tuple[Parts, ...] | None = None
    entered: Tensor | None = None
    estimates: Estimates | None = None

    @property
    def short(self) -> bool:
        return self.history.short

    def alive(self) -> Tensor | None:
        """Which tokens are left, in the shape of a fact; None where all are."""
        return self.restore(torch.ones_like(self.history.raster_index, dtype=torch.bool)) if self.short else None

    @property
    @abstractmethod
    def arrangement(self) -> Any:
        """How the live tokens lie in the tower: another object after every drop."""

    @abstractmethod
    def restore(self, values: Tensor, arrangement: Any = None) -> Tensor:
        """Values [ΣK, ...] of the tokens that are live, or were in an earlier arrangement, in the shape of a fact, 0
        where a token was dropped."""


class Tower(ABC):
    """Installs the hooks that the stages need in the tower; none where they need none. After the tower has run,
    `run.tower` holds the state of the call.

    Raises:
        UnsupportedError: attention facts of a layer whose tokens attend within windows.
    """

    def __init__(self, context: Context) -> None:
        self.context, self.run, self.adapter = context, context.run, context.adapter
        self.encoder, self.choosers = self.adapter.encoder, context.at("frames")
        self.towers = ((self.adapter.tower, self.encoder.layers), *self.encoder.twins)
        self.resizers, self.by_pixels = parted(context.at("pixels"))
        depth, wanted = len(self.encoder.layers), context.wanted
        stages = [stage.for_depth(depth) for stage in context.at("encoder")]
        self.stages = without_refill(stages)
        self.at = by_layer([stage for stage in self.stages if not stage.merge_point()], depth)
        # What lies after the last layer that features are read from is not asked.
        inside, last = [stage for stage in self.stages if stage.merge_point()], min(self.encoder.feature_layers)
        self.merging = {k: acting if k <= last else [] for k, acting in by_layer(inside, depth).items()}
        self.features, self.pixels = (any(fact.name == name for fact in wanted) for name in ("features", "pixels"))
        per_layer = self._facts_of_layers(wanted)
        if any((wanted, stages, self.choosers, self.resizers, self.by_pixels)):
            self._install(per_layer)
        refill(context, stages, lambda: self.state)

    def _install(self, per_layer: dict[int, set[Fact]]) -> None:
        handle = self.context.handle
        thinned = bool(self.choosers or self.by_pixels)
        for tower, layers in self.towers:
            handle.before(tower, self._start)
            for layer, module in enumerate(layers):
                if per_layer[layer]:
                    attention = self._tap(module, projections(per_layer[layer]))
                    handle.after(attention, partial(self._facts, layer, sorted(per_layer[layer])))
                if (layer and self.stages) or (thinned and self.encoder.packed):
                    handle.before(module, partial(self._layer, layer))
        self._behind()

    def _facts_of_layers(self, wanted: Iterable[Fact]) -> dict[int, set[Fact]]:
        """Which facts are read off each layer."""
        found: dict[int, set[Fact]] = {layer: set() for layer in range(len(self.encoder.layers))}
        asked = [(fact, fact, "a later stage") for fact in wanted if fact.name in OF_LAYER]
        for layer, acting in self.at.items():
            for stage in acting + self.merging[layer]:
                asked += [(self._stored(need, layer), need, f"stage {stage.name}") for need in stage.needs()]
        for fact, need, who in asked:
            assert fact.layer is not None, f"{need} came without a layer"
            check_windows(self.encoder.full_attention, need.name, fact.layer, who)
            found[fact.layer].add(fact)
        return found

    def _stored(self, need: Fact, layer: int) -> Fact:
        """The fact that a stage acting after `layer` is given for `need`: substituted, its layer counted from 0."""
        name = self.adapter.substitutes.get(need.name, need.name)
        return Fact(name, layer if need.layer is None else need.layer % len(self.encoder.layers), need.above)

    @property
    def state(self) -> Any:
        return self.run.tower

    def _keep(self, name: str, out: Tensor) -> None:
        if self.state is not None:  # not when gradient checkpointing runs the layer again
            self.state.taps[name] = out

    @torch.no_grad()
    def _facts(self, layer: int, wanted: list[Fact], module: Any, args: tuple, kwargs: dict, out: Any) -> None:
        state = self.state
        if state is None or state.skip_reason is not None:
            return
        found = self._projected(module, kwargs)
        state.taps = {}
        for fact in wanted:
            value = self._per_token(self._compute(fact, found))
            state.read[fact] = value, state.arrangement
            if fact in self.context.wanted:
                state.facts[fact] = state.restore(value)

    def _layer(self, layer: int, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before a layer: the stages that act after the one before it decide, and only what is left is handed on."""
        check_replay(module)
        given = args[0] if args else kwargs["hidden_states"]
        hidden = self._entering(layer, given)
        for stage in self.at.get(layer - 1, ()):
            hidden = self._decide(stage, layer - 1, hidden)
        more = self._survivors(layer, hidden, kwargs)
        if hidden is given and not more:
            return None
        if not args:
            return args, {**kwargs, "hidden_states": hidden, **more}
        if len(args) > 1 and "attention_mask" in more:
            return (hidden, more.pop("attention_mask"), *args[2:]), {**kwargs, **more}
        return (hidden, *args[1:]), {**kwargs, **more}

    def _decide(self, stage: Stage, layer: int, hidden: Tensor) -> Tensor:
        """Lets a stage choose among the live tokens; returns the hidden states of those that remain."""
        state, device = self.state, hidden.device
        history: TokenHistory = state.history
        if state.skip_reason is not None:
            state.traces.append(skipped_entry(stage, history, state.skip_reason, layer))
            return hidden
        values = self._gather(hidden)
        parts, segment = self._rasters()
        tokens = VisualTokens.pack(
            self._seen(values),
            history.counts,
            parts,
            range(len(parts)),
            history.raster_index.to(device),
            segment=None if segment is None else segment.to(device),
            facts={need: self._read(self._stored(need, layer)).to(device) for need in stage.needs()},
            layer=layer,
            memory=state.memory.setdefault(id(stage), {}),
            size=history.size,
            lead=int(self.encoder.cls),
        )
        given = substituted(stage, self.adapter.substitutes)
        found = decide(
            stage, tokens, history, skipped=state.skipped, amend=partial(self._amend, stage), substitutes=given
        )
        state.history = found.history
        state.traces.append(found.trace)
        return hidden if found.untouched else self._put_back(found.keep, values, hidden)

    def _compute(self, fact: Fact, layer: EncoderLayer) -> Tensor:
        """One fact of the layer's live tokens, CLS included."""
        return compute(fact, layer)

    def _amend(self, stage: Stage, keep: Keep) -> Keep:
        """Checks every decision: a packed tower needs at least one token."""
        return leaves_some(stage, keep) if self.encoder.packed else keep

    @abstractmethod
    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> Any:
        """Before the tower: the state of this call."""

    def _tap(self, module: Any, letters: list[str]) -> nn.Module:
        """Has `_keep` called with these projections of a layer; returns its attention."""
        attention: nn.Module = getattr(module, self.encoder.attention)
        for letter in letters:
            self.context.handle.after_child(attention, self.encoder.taps[letter], partial(self._keep, letter))
        return attention

    @abstractmethod
    def _behind(self) -> None:
        """Installs what gives features their length back after the tower."""

    @abstractmethod
    def _projected(self, module: Any, kwargs: dict) -> EncoderLayer:
        """What facts are computed from, once the layer's attention has run."""

    @abstractmethod
    def _per_token(self, value: Tensor) -> Tensor:
        """[ΣK, ...] per live token, of a fact as it was computed (per patch, with CLS)."""

    def _entering(self, layer: int, hidden: Tensor) -> Tensor:
        """Hidden states of the live tokens, before stages and the layer see them."""
        return hidden

    @abstractmethod
    def _survivors(self, layer: int, hidden: Tensor, kwargs: dict) -> dict[str, Any]:
        """Arguments of the layer that fit what is left."""

    def _read(self, fact: Fact) -> Tensor:
        """[ΣK, ...] a fact of the live tokens as a layer gave it, in reading order."""
        values, arrangement = self.state.read[fact]
        if arrangement is self.state.arrangement:
            return self._in_order(values)
        return self._live(self.state.restore(values, arrangement))

    def _in_order(self, values: Tensor) -> Tensor:
        """[ΣK, ...] of the live tokens as the tower holds them, in reading order."""
        return values

    @abstractmethod
    def _gather(self, hidden: Tensor) -> Tensor:
        """[ΣK, ...] the live tokens of hidden states."""

    def _seen(self, values: Tensor) -> Tensor:
        """[ΣK, D] what a stage sees of the live tokens."""
        return values

    @abstractmethod
    def _live(self, fact: Tensor) -> Tensor:
        """[ΣK, ...] of the live tokens, from a fact in the shape that `restore` gives."""

    @abstractmethod
    def _rasters(self) -> tuple[tuple[Parts, ...], Tensor | None]:
        """Rasters of each image, and [ΣK] segment of each live token (None: one segment per image)."""

    @abstractmethod
    def _put_back(self, keep: Keep, values: Tensor, hidden: Tensor) -> Tensor:
        """Hidden states of what a decision leaves of `values`, as the next layer takes them."""


def check_windows(full: Sequence[int] | None, name: str, layer: int, who: str) -> None:
    """Raises UnsupportedError at attention facts of a layer that attends within windows; `full` as in Encoder."""
    spec = OF_LAYER[name]
    if spec.queries and not spec.whole and full is not None and layer not in full:
        raise UnsupportedError(
            f"{who} needs {name} of encoder layer {layer}, where tokens attend within windows only; the layers "
            f"with full attention are {', '.join(map(str, full))}: name one of them"
        )


def leaves_some(stage: Stage, keep: Keep) -> Keep:
    """The decision, if it leaves anything.

    Raises:
        ValueError: names the stage.
    """
    if not len(keep.index):
        raise ValueError(
            f"stage {stage.name} dropped every visual token inside the vision tower, which needs at least one"
        )
    return keep
