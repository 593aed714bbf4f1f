"""The one call: a pipeline is checked against the model, and only what it needs is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from vtoken import config, registry
from vtoken.adapters.base import Adapter
from vtoken.cached import CacheStage
from vtoken.checks import check, check_whole
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.hooks import facts
from vtoken.hooks.attention import observe, tap, tapped
from vtoken.hooks.boundary import Boundary
from vtoken.hooks.cache import Owner
from vtoken.hooks.encoder import EncoderHooks
from vtoken.hooks.features import FeatureHooks
from vtoken.hooks.guard import Guard
from vtoken.hooks.handle import Handle
from vtoken.hooks.kv import CacheHooks
from vtoken.hooks.layers import LayerGroups
from vtoken.hooks.outer import Outer
from vtoken.hooks.packed import PackedHooks
from vtoken.hooks.sparse import SparsePrefill
from vtoken.hooks.unmerge import Unmerge
from vtoken.run import Run
from vtoken.stages import Fact, Site, Stage
from vtoken.tracing import Trace


class Session:
    """Everything one wrap put on one model."""

    def __init__(self, model: Any, pipeline: Pipeline) -> None:
        self.pipeline = pipeline
        self.adapter: Adapter = registry.adapter(model.config.model_type)(model)
        check(self.adapter, pipeline)
        self.run, self.handle, self.owner = Run(), Handle(), Owner()
        encoder, tokens, decoder, cache = (self._at(site) for site in ("encoder", "tokens", "decoder", "cache"))
        wanted = {self._resolve(need) for stage in tokens for need in stage.needs() if need.name != "text"}
        wanted |= {
            self._resolve(need) for stage in decoder for need in stage.needs() if need.name in facts.INSIDE_DECODER
        }
        compact = pipeline.positions == "compact"
        try:
            if pipeline.anyres == "2x2":
                side = 2 * model.config.vision_config.image_size
                self.handle.set(model.config, "image_grid_pinpoints", [[side, side]])
            early = encoder or self._at("frames") or wanted
            least = pipeline.min_visual_tokens if early else 0
            guard = Guard(self.adapter, self.run, self.handle, least) if least else None
            Outer(self.adapter, self.run, self.handle, guard)
            FeatureHooks(self.adapter, self.run, self.handle, least)
            tower: Any = EncoderHooks if self.adapter.encoder.unit == 1 else PackedHooks
            tower(self.adapter, self.run, self.handle, wanted, encoder, self._at("frames"))
            # Sparse attention lies within the taps that observe, which come later and see every layer.
            sparse = SparsePrefill(self.adapter.lm, self.run, self.handle, self._at("attention"))
            unmerge = [
                Unmerge(self.adapter.lm, self.run, self.handle, stage, mrope=self.adapter.mrope)
                for stage in self._at("attention")
                if stage.unmerges()
            ]
            kv = None
            for stage in cache:
                assert isinstance(stage, CacheStage)
                kv = CacheHooks(model, self.adapter.lm, self.run, self.handle, stage, mrope=self.adapter.mrope)
                sparse.also = kv.asks
            self.boundary = Boundary(
                self.adapter,
                self.run,
                self.handle,
                tokens,
                compact=compact,
                always=bool(decoder or cache),
                newline=pipeline.newline,
                owner=self.owner,
                resolve=self._resolve,
                unmerge=unmerge[0] if unmerge else None,
                kv=kv,
                least=pipeline.min_visual_tokens,
                preset=pipeline.name
                if pipeline.name in registry.presets() and pipeline == config.load(pipeline.name)
                else None,
            )
            LayerGroups(
                self.adapter.lm,
                self.run,
                self.handle,
                decoder,
                compact=compact,
                enter=self.boundary.enter,
                encoded=self.boundary.entry.fact,
                cached=bool(cache),
            )
            asked = tapped(decoder, len(self.adapter.lm.layers))
            if asked:
                tap(self.handle, self.adapter.lm, asked, observe(self.run, asked))
        except BaseException:
            self.handle.release()
            raise

    def _at(self, site: Site) -> list[Stage]:
        return [stage for stage in self.pipeline.stages if stage.site == site]

    def _resolve(self, fact: Fact) -> Fact:
        name, encoder = self.adapter.substitutes.get(fact.name, fact.name), self.adapter.encoder
        if name not in facts.PROJECTIONS:
            return Fact(name)
        layer = encoder.attention_layer if fact.layer is None else fact.layer % len(encoder.layers)
        if name != fact.name and encoder.full_attention is not None:
            # What stands in for CLS needs all tokens of the image: the next layer that sees them.
            layer = min((k for k in encoder.full_attention if k >= layer), default=max(encoder.full_attention))
        return Fact(name, layer, fact.above)

    @property
    def trace(self) -> Trace | None:
        return self.run.trace or self.boundary.last

    def release(self) -> None:
        self.owner.alive = False
        self.handle.release()


_SESSIONS: WeakKeyDictionary[nn.Module, Session] = WeakKeyDictionary()


def wrap(model: Any, pipeline: Any) -> Any:
    """Makes a stock Hugging Face VLM run a pipeline; returns the same object.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`. It is used as before: `generate`, `forward`, batches, beams, caches.
        pipeline: preset name, `"method:keep"`, path to a YAML file, dict, list of stages, or stage objects.

    Raises:
        UnsupportedError: the model or a stage cannot be served; the message says why and what can.
        ConfigError: the pipeline does not read.
    """
    if model in _SESSIONS:
        raise UnsupportedError(
            f"this model is wrapped already (pipeline {_SESSIONS[model].pipeline.name!r}); call vtoken.unwrap(model) first"
        )
    parsed = config.load(pipeline)
    check_whole(model)
    _SESSIONS[model] = Session(model, parsed)
    return model


def unwrap(model: Any) -> Any:
    """Takes everything back that `wrap` put on the model; returns the model, bit-exact as before.

    KV caches that hold a pruned prompt cannot be continued afterwards (they say so).

    Raises:
        UnsupportedError: the model is not wrapped.
    """
    if model not in _SESSIONS:
        raise UnsupportedError("this model is not wrapped")
    _SESSIONS.pop(model).release()
    return model


@contextmanager
def wrapped(model: Any, pipeline: Any) -> Iterator[Any]:
    """`wrap` for the length of a with-block."""
    wrap(model, pipeline)
    try:
        yield model
    finally:
        if model in _SESSIONS:
            unwrap(model)


def match_processor(processor: Any, model: Any) -> Any:
    """Gives a LLaVA-NeXT or OneVision processor the crop grids of the model (of the wrapped model: `anyres: 2x2`); returns the processor.

    Raises:
        UnsupportedError: model or processor do not cut pictures into crops.
    """
    pinpoints = getattr(model.config, "image_grid_pinpoints", None)
    if pinpoints is None or not hasattr(processor.image_processor, "image_grid_pinpoints"):
        raise UnsupportedError(
            f"{type(model).__name__} with {type(processor).__name__} does not cut pictures into crops"
        )
    processor.image_processor.image_grid_pinpoints = [list(size) for size in pinpoints]
    return processor


def trace(model: Any) -> Trace:
    """What happened in the last prefill: of the calling thread, or of any thread if this one ran none.

    Under beam search or several return sequences, images are those of the expanded batch.

    Raises:
        UnsupportedError: the model is not wrapped, or has not run since.
    """
    session = _SESSIONS.get(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped; a trace exists only while it is")
    if session.trace is None:
        raise UnsupportedError("the wrapped model has not run yet; call generate or forward first")
    return session.trace
