"""The one call: a pipeline is checked against the model, and only what it needs is installed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, Protocol, TypeVar, cast
from weakref import WeakKeyDictionary

from torch import nn

from vtoken import config, registry
from vtoken.adapters.base import Adapter
from vtoken.compatibility import check, check_whole
from vtoken.config import Pipeline, PipelineLike
from vtoken.config.beside import of_model
from vtoken.errors import UnsupportedError, about
from vtoken.hooks.attention.sparse_prefill import SparsePrefill
from vtoken.hooks.attention.unmerge import Unmerge
from vtoken.hooks.boundary.boundary import Boundary
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.call.inputs import CallInputs
from vtoken.hooks.decoder.attention_tap import observe
from vtoken.hooks.decoder.layer_groups import LayerGroups
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.installed import described
from vtoken.hooks.state.trace import Trace
from vtoken.hooks.vision.features import FeatureHooks
from vtoken.hooks.vision.padded_tower import PaddedTower
from vtoken.hooks.vision.rows_tower import RowsTower
from vtoken.hooks.vision.tower import Tower
from vtoken.hooks.vision.varlen_tower import VarlenTower


class ModelLike(Protocol):
    """A Hugging Face model, as it is, in a PeftModel, or what torch.compile makes of it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


M = TypeVar("M", bound=ModelLike)
SESSION = "_vtoken_session"  # attribute of a wrapped model; whoever drops the model drops its session with it


def install(context: Context) -> Boundary:
    """Puts the hooks on that the stages need, in the order of a forward."""
    CallInputs(context)
    FeatureHooks(context)
    encoder = context.adapter.encoder
    tower: type[Tower] = RowsTower if encoder.by_rows else VarlenTower if encoder.packed else PaddedTower
    tower(context)
    # Sparse attention lies within the taps that observe, which come later and see every layer.
    SparsePrefill(context)
    unmerge = None if context.unmerging is None else Unmerge(context, context.unmerging)
    cache = None if context.cache_stage is None else CacheShrinker(context, context.cache_stage)
    boundary = Boundary(context, unmerge=unmerge, cache=cache)
    LayerGroups(context)
    observe(context)
    return boundary


class Session:
    """Everything one wrap put on one model: nothing for a pipeline without stages, unless it is `watched`."""

    def __init__(self, model: Any, pipeline: Pipeline, *, watched: bool = False) -> None:
        self.pipeline = pipeline
        self.boundary: Boundary | None = None
        self.adapter: Adapter = registry.adapter(model.config.model_type)(model)
        check(self.adapter, pipeline)
        self.context = context = Context(
            self.adapter,
            stages=pipeline.stages,
            compact=pipeline.positions == "compact",
            newline=pipeline.newline,
            min_tokens=pipeline.min_visual_tokens,
        )
        try:
            context.handle.set(model, SESSION, self)
            if pipeline.anyres == "2x2":
                side, cut = 2 * model.config.vision_config.image_size, copy(model.config)
                cut.image_grid_pinpoints = [[side, side]]
                # The whole model's config is what gets saved; this one is read where pictures are cut.
                context.handle.set(self.adapter.outer, "config", cut)
            if pipeline.stages or watched:
                self.boundary = install(context)
        except BaseException:
            context.handle.release()
            raise

    @property
    def trace(self) -> Trace:
        """Of the last prefill.

        Raises:
            UnsupportedError: there is none.
        """
        if self.boundary is None:
            raise UnsupportedError(
                f"pipeline {self.pipeline.name!r} has no stages, so nothing is installed and nothing is traced"
            )
        found = self.context.run.trace or self.boundary.last
        if found is None:
            raise UnsupportedError("the wrapped model has not run yet; call generate or forward first")
        return found

    def __repr__(self) -> str:
        """The pipeline, and what is installed where."""
        head = f"vtoken session of {self.pipeline.name!r} on {self.adapter.model_type}"
        return "\n  ".join([head, *described(self.adapter.model, self.context.handle.installed)])

    def release(self) -> None:
        self.context.owner.alive = False
        for stage in self.pipeline.stages:
            stage.unload()
        self.context.handle.release()


def whole(model: Any) -> Any:
    """The model itself, where it is given inside a PeftModel or what torch.compile makes of it."""
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):  # peft
            model = cast(Any, model).get_base_model()
        else:
            break
    return model


def session_of(model: Any) -> Session | None:
    """What wraps the model, if anything does."""
    found: Session | None = vars(whole(model)).get(SESSION) if isinstance(model, nn.Module) else None
    return found


def wrap(model: M, pipeline: PipelineLike | None = None) -> M:
    """Makes a stock Hugging Face VLM run a pipeline; returns the same object.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`, also inside a PeftModel or compiled by torch.compile. It is used
            as before: `generate`, `forward`, batches, beams, caches.
        pipeline: preset name, `"method:keep"`, path to a YAML file, dict, list of stages, or stage objects; a folder
            or repository of the Hub that holds a `vtoken.yaml`. None: what travels with the model, in `vtoken` of its
            config or in a `vtoken.yaml` beside its weights (see `save`).

    Raises:
        UnsupportedError: the model or a stage cannot be served; the message says why and what can.
        ConfigError: the pipeline does not read, or none was given and none travels with the model.
    """
    _install(model, pipeline)
    return model


def _install(model: Any, pipeline: PipelineLike | None, *, watched: bool = False) -> None:
    session = session_of(model)
    if session is not None:
        raise UnsupportedError(
            f"this model is wrapped already (pipeline {session.pipeline.name!r}); call vtoken.unwrap(model) first"
        )
    inner = whole(model)
    told = ""
    if pipeline is None:
        check_whole(inner)
        pipeline, told = of_model(inner.config)
    with about(told):
        parsed = config.load(pipeline)
    check_whole(inner)
    with about(parsed.written):
        Session(inner, parsed, watched=watched)


def unwrap(model: M) -> M:
    """Takes everything back that `wrap` put on the model; returns the model, bit-exact as before.

    KV caches that hold a pruned prompt cannot be continued afterwards (they say so).

    Raises:
        UnsupportedError: the model is not wrapped.
        ExceptionGroup: some changes could not be taken back; all others are.
    """
    session = session_of(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped")
    session.release()
    return model


@contextmanager
def wrapped(model: M, pipeline: PipelineLike | None = None) -> Iterator[M]:
    """`wrap` for the length of a with-block."""
    _install(model, pipeline)
    try:
        yield model
    finally:
        if session_of(model) is not None:
            unwrap(model)


@contextmanager
def watched(model: M, pipeline: PipelineLike) -> Iterator[M]:
    """As `wrapped`, but a pipeline without stages is traced, too."""
    _install(model, pipeline, watched=True)
    try:
        yield model
    finally:
        unwrap(model)


_GRIDS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # image processor -> the crop grids that it had


def match_processor(processor: Any, model: Any) -> Any:
    """Gives a LLaVA-NeXT or OneVision processor the crop grids of the model (of the wrapped model: `anyres: 2x2`);
    returns the processor.

    `unmatch_processor` takes it back.

    Raises:
        UnsupportedError: model or processor do not cut pictures into crops.
    """
    outer = getattr(whole(model), "model", None)
    pinpoints, images = getattr(getattr(outer, "config", None), "image_grid_pinpoints", None), processor.image_processor
    if pinpoints is None or not hasattr(images, "image_grid_pinpoints"):
        raise UnsupportedError(
            f"{type(model).__name__} with {type(processor).__name__} does not cut pictures into crops"
        )
    _GRIDS.setdefault(images, images.image_grid_pinpoints)
    images.image_grid_pinpoints = [list(size) for size in pinpoints]
    return processor


def unmatch_processor(processor: Any) -> Any:
    """Gives a processor the crop grids back that it had before `match_processor`; returns the processor.

    Raises:
        UnsupportedError: it was not matched.
    """
    if processor.image_processor not in _GRIDS:
        raise UnsupportedError(f"this {type(processor).__name__} was not matched to a model; nothing to take back")
    processor.image_processor.image_grid_pinpoints = _GRIDS.pop(processor.image_processor)
    return processor


def pipeline(model: Any) -> Pipeline | None:
    """What the model is wrapped with, None if it is not; its repr is YAML that loads back."""
    session = session_of(model)
    return None if session is None else session.pipeline


def trace(model: Any) -> Trace:
    """What happened in the last prefill: of the calling thread, or of any thread if this one ran none.

    Under beam search or several return sequences, images are those of the expanded batch.

    Raises:
        UnsupportedError: the model is not wrapped, has not run since, or its pipeline has no stages.
    """
    session = session_of(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped; a trace exists only while it is")
    return session.trace
