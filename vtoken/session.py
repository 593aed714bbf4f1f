"""`wrap`, `unwrap` and their relatives: checks a pipeline against the model and installs only the hooks it needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
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
from vtoken.hooks.attention.steering import Steering
from vtoken.hooks.attention.unmerge import Unmerge
from vtoken.hooks.boundary.boundary import Boundary
from vtoken.hooks.cache.head_classes import HeadSplitter
from vtoken.hooks.cache.shrink import CacheShrinker
from vtoken.hooks.call.contrast import Contrasting
from vtoken.hooks.call.inputs import CallInputs
from vtoken.hooks.call.pairing import check_target
from vtoken.hooks.decode.choose import SlotChooser
from vtoken.hooks.decoder.attention_tap import observe
from vtoken.hooks.decoder.blocks import watch_blocks
from vtoken.hooks.decoder.layer_groups import LayerGroups
from vtoken.hooks.decoder.state_rows import StateRows
from vtoken.hooks.decoder.target_attention import TargetAttention
from vtoken.hooks.decoder.target_states import TargetStates
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.installed import described
from vtoken.hooks.state.trace import Trace
from vtoken.hooks.state.twin import twin
from vtoken.hooks.vision.features import FeatureHooks
from vtoken.hooks.vision.towers import tower_of


class ModelLike(Protocol):
    """A Hugging Face model: plain, inside a PeftModel, or compiled by torch.compile."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


M = TypeVar("M", bound=ModelLike)
SESSION = "_vtoken_session"  # attribute of a wrapped model, so that the session is freed together with the model


def install(context: Context) -> Boundary:
    """Installs the hooks that the stages need, in the order of a forward."""
    CallInputs(context)
    FeatureHooks(context)
    tower_of(context.adapter.encoder)(context)
    # Sparse attention is installed before the taps that observe: those wrap it and see every layer.
    SparsePrefill(context)
    unmerge = None if context.unmerging is None else Unmerge(context, context.unmerging)
    stage = context.cache_stage
    cache = None if stage is None else (HeadSplitter if stage.in_classes else CacheShrinker)(context, stage)
    chooser = None if context.decode_stage is None else SlotChooser(context, context.decode_stage)
    boundary = Boundary(context, unmerge=unmerge, cache=cache, chooser=chooser)
    LayerGroups(context)
    StateRows(context)
    Steering(context)
    observe(context)
    watch_blocks(context)
    if context.recorded is not None:
        context.recorded.observe(context)
    return boundary


class Session:
    """Everything that one `wrap` installed on one model. A pipeline without stages installs no hooks, unless it is
    `watched`. On a target, `recorded` records what its draft reads; a draft gets that record as `target`, and the
    target's adapter as `drafts_for`."""

    def __init__(
        self,
        model: Any,
        pipeline: Pipeline,
        *,
        watched: bool = False,
        recorded: TargetAttention | TargetStates | None = None,
        target: TargetAttention | None = None,
        drafts_for: Adapter | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.boundary: Boundary | None = None
        self.against: Session | None = None  # of the model that answers are compared with
        self.pair: Any = None  # what joins the model to its draft or its target, see drafts.py
        self.adapter: Adapter = registry.adapter(model.config.model_type)(model)
        check_target(pipeline.stages, drafts_for)
        check(self.adapter, pipeline)
        self.context = context = Context(
            self.adapter,
            stages=pipeline.stages,
            compact=pipeline.positions == "compact",
            newline=pipeline.newline,
            min_tokens=pipeline.min_visual_tokens,
            recorded=recorded,
            target=target,
        )
        # The copy is made while nothing is installed, so that it holds no hooks.
        other = twin(model) if (against := pipeline.contrast) is not None and against.alpha else None
        try:
            context.handle.set(model, SESSION, self)
            if pipeline.anyres == "2x2":
                side, cut = 2 * model.config.vision_config.image_size, copy(model.config)
                cut.image_grid_pinpoints = [[side, side]]
                # The config of the whole model is saved with it; the code that cuts pictures reads this one.
                context.handle.set(self.adapter.outer, "config", cut)
            if pipeline.stages or watched:
                self.boundary = install(context)
            if against is not None and other is not None:
                with about("contrast"):  # it gets the same crops
                    self.against = Session(other, replace(against.pipeline, anyres=pipeline.anyres))
                Contrasting(context.handle, model, self.against.context, against.alpha, against.beta)
        except BaseException:
            self.release()
            raise

    @property
    def trace(self) -> Trace:
        """The trace of the last prefill.

        Raises:
            UnsupportedError: nothing has been traced.
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
        """The pipeline, and where each hook is installed."""
        head = f"vtoken session of {self.pipeline.name!r} on {self.adapter.model_type}"
        return "\n  ".join([head, *described(self.adapter.model, self.context.handle.installed)])

    def release(self) -> None:
        """Undoes everything; errors as in `unwrap`."""
        self.context.owner.alive = False
        for stage in self.pipeline.stages:
            stage.unload()
        try:
            if self.against is not None:
                self.against.release()
        finally:
            self.context.handle.release()


def whole(model: Any) -> Any:
    """The model itself, without the PeftModel or torch.compile wrapper around it."""
    while isinstance(model, nn.Module):
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif hasattr(type(model), "get_base_model"):  # peft
            model = cast(Any, model).get_base_model()
        else:
            break
    return model


def session_of(model: Any) -> Session | None:
    """The session of a wrapped model; None if it is not wrapped."""
    return cast("Session | None", vars(whole(model)).get(SESSION)) if isinstance(model, nn.Module) else None


def wrap(model: M, pipeline: PipelineLike | None = None) -> M:
    """Makes a stock Hugging Face VLM run a pipeline; returns the same object.

    Args:
        model: e.g. a `LlavaForConditionalGeneration`, also inside a PeftModel or compiled by torch.compile. It is used
            as before: `generate`, `forward`, batches, beams, caches.
        pipeline: preset name, `"method:keep"`, path to a YAML file, dict, list of stages, or stage objects; a folder
            or repository of the Hub with a `vtoken.yaml`. None: the pipeline saved with the model (see `save`), under
            `vtoken` in its config or in a `vtoken.yaml` beside its weights.

    Raises:
        UnsupportedError: the model or a stage is not supported; the message says why, and what is.
        ConfigError: the pipeline is not valid, or none was given and none was saved with the model.
    """
    _install(model, pipeline)
    return model


def _install(model: Any, pipeline: PipelineLike | None, *, watched: bool = False) -> None:
    session = session_of(model)
    if session is not None:
        raise UnsupportedError(
            f"this model is wrapped already (pipeline {session.pipeline.name!r}); call vtoken.unwrap(model) first"
        )
    inner, source = whole(model), ""
    check_whole(inner)
    if pipeline is None:
        pipeline, source = of_model(inner.config)
    with about(source):
        parsed = config.load(pipeline)
    with about(parsed.written):
        Session(inner, parsed, watched=watched)


def unwrap(model: M) -> M:
    """Undoes everything that `wrap` did to the model; returns the model, bit-exact as before.

    A KV cache of a pruned prompt cannot be used afterwards; that raises an error.

    Raises:
        UnsupportedError: the model is neither wrapped nor one of a pair of draft and target.
        ExceptionGroup: some changes could not be undone; all others were.
    """
    session = session_of(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped")
    if session.pair is not None:
        session.pair.dissolve()
        session = session_of(model)
    if session is not None:
        session.release()
    return model


@contextmanager
def wrapped(model: M, pipeline: PipelineLike | None = None) -> Iterator[M]:
    """`wrap` for the duration of a with-block."""
    with watched(model, pipeline, traced=False):
        yield model


@contextmanager
def watched(model: M, pipeline: PipelineLike | None, *, traced: bool = True) -> Iterator[M]:
    """As `wrapped`; with `traced`, a pipeline without stages is traced too."""
    _install(model, pipeline, watched=traced)
    try:
        yield model
    finally:
        if session_of(model) is not None:
            unwrap(model)


_GRIDS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # image processor -> its original crop grids


def match_processor(processor: Any, model: Any) -> Any:
    """Gives a LLaVA-NeXT or OneVision processor the crop grids of the model, which differ from its own if the model is
    wrapped with `anyres: 2x2`; returns the processor. `unmatch_processor` undoes this.

    Raises:
        UnsupportedError: the model or the processor does not have crop grids.
    """
    images: Any = getattr(processor, "image_processor", None)
    outer = getattr(whole(model), "model", None)
    pinpoints = getattr(getattr(outer, "config", None), "image_grid_pinpoints", None)
    if pinpoints is None or not hasattr(images, "image_grid_pinpoints"):
        raise UnsupportedError(
            f"{type(model).__name__} with {type(processor).__name__} does not have crop grids (image_grid_pinpoints)"
        )
    _GRIDS.setdefault(images, images.image_grid_pinpoints)
    images.image_grid_pinpoints = [list(size) for size in pinpoints]
    return processor


def unmatch_processor(processor: Any) -> Any:
    """Restores the crop grids that a processor had before `match_processor`; returns the processor.

    Raises:
        UnsupportedError: the processor was not matched.
    """
    images: Any = getattr(processor, "image_processor", None)
    if images not in _GRIDS:
        raise UnsupportedError(f"this {type(processor).__name__} was not matched to a model; nothing to take back")
    images.image_grid_pinpoints = _GRIDS.pop(images)
    return processor


def pipeline(model: Any) -> Pipeline | None:
    """The pipeline of a wrapped model, None if it is not wrapped. Its repr is YAML that loads back."""
    session = session_of(model)
    return None if session is None else session.pipeline


def trace(model: Any) -> Trace:
    """The trace of the last prefill in the calling thread, or in any thread if this one has run none.

    Under beam search or with several return sequences, images are those of the expanded batch.

    Raises:
        UnsupportedError: the model is not wrapped, has not run since, or its pipeline has no stages.
    """
    session = session_of(model)
    if session is None:
        raise UnsupportedError("this model is not wrapped; a trace exists only while it is")
    return session.trace
