"""What every hook class is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.pruned_cache import CacheOwner
from vtoken.hooks.state.run import Run
from vtoken.stages import Fact, Site, Stage
from vtoken.stages.cache import CacheStage
from vtoken.stages.decode import DecodeStage
from vtoken.stages.facts import encoded, read_of
from vtoken.stages.steering import SteeredAttention

if TYPE_CHECKING:
    from vtoken.adapters.base import Adapter
    from vtoken.hooks.decoder.target_attention import TargetAttention
    from vtoken.hooks.decoder.target_states import TargetStates


@dataclass(frozen=True)
class Context:
    """A model, a pipeline, and the state that their hooks share.

    Attributes:
        stages: those of the pipeline, in its order.
        compact: positions are renumbered after dropping, those of decode steps included.
        newline: which newline tokens stay: keep_if_row_has_token, keep or drop.
        min_tokens: visual tokens below which a batch row runs dense.
        owner: who may continue the caches that are pruned here.
        read: facts of the vision tower (with layers resolved) that something other than a stage reads.
        recorded: of a target: what its draft reads of it; target: of a draft: the attention that its target recorded.
    """

    adapter: Adapter
    run: Run = field(default_factory=Run)
    handle: Handle = field(default_factory=Handle)
    stages: tuple[Stage, ...] = ()
    compact: bool = False
    newline: str = "keep"
    min_tokens: int = 0
    owner: CacheOwner = field(default_factory=CacheOwner)
    read: frozenset[Fact] = frozenset()
    recorded: TargetAttention | TargetStates | None = None
    target: TargetAttention | None = None

    @property
    def lm(self) -> Any:
        return self.adapter.lm

    @property
    def depth(self) -> int:
        """Layers of the decoder."""
        return len(self.adapter.lm.layers)

    @property
    def attending(self) -> tuple[int, ...]:
        """Layers of the decoder with attention; the others keep a state."""
        return self.adapter.attending

    def at(self, *sites: Site) -> list[Stage]:
        return [stage for stage in self.stages if stage.site in sites]

    @property
    def cache_stage(self) -> CacheStage | None:
        """There is one at most."""
        return next((stage for stage in self.stages if isinstance(stage, CacheStage)), None)

    @property
    def decode_stage(self) -> DecodeStage | None:
        """There is one at most."""
        return next((stage for stage in self.stages if isinstance(stage, DecodeStage)), None)

    @cached_property
    def unmerging(self) -> Stage | None:
        """The stage that lets merged tokens attend at all their places; there is one at most."""
        return next((stage for stage in self.at("attention") if stage.unmerge_mode()), None)

    @cached_property
    def steering(self) -> tuple[SteeredAttention, ...]:
        """The stages that steer attention, in the prompt and at every step."""
        return tuple(stage for stage in self.stages if isinstance(stage, SteeredAttention))

    @cached_property
    def wanted(self) -> frozenset[Fact]:
        """Facts that the vision tower must store: `read`, and what stages of sites tokens and decoder ask for."""
        asked = [(need, stage.site) for stage in self.at("tokens", "decoder") for need in stage.needs()]
        return self.read | {self.resolve(need) for need, site in asked if encoded(need, site)}

    @cached_property
    def min_tokens_of_tower(self) -> int:
        """`min_tokens`, where a stage acts before or in the vision tower, or facts are read off it; else 0."""
        return self.min_tokens if self.at("pixels", "frames", "encoder") or self.wanted else 0

    def resolve(self, fact: Fact) -> Fact:
        """The fact that the vision tower stores for one that a stage reads later: with its layer, and with the family's
        substitute where the family lacks it."""
        name, encoder = self.adapter.substitutes.get(fact.name, fact.name), self.adapter.encoder
        if name not in read_of("encoder layer"):
            return Fact(name)
        layer = encoder.attention_layer if fact.layer is None else fact.layer % len(encoder.layers)
        if name != fact.name and encoder.full_attention is not None:
            # The substitute for CLS attention needs a layer that sees all tokens of the image: the next such layer.
            layer = min((k for k in encoder.full_attention if k >= layer), default=max(encoder.full_attention))
        return Fact(name, layer, fact.above)


def by_layer(stages: Sequence[Stage], depth: int) -> dict[int, list[Stage]]:
    """Layer -> the stages that act there, of `depth` layers."""
    return {layer: [stage for stage in stages if layer in stage.layers(depth)] for layer in range(depth)}
