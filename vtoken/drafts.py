"""The entry point `draft`: a model that drafts for another, and sees the same pictures."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

from vtoken import config, registry
from vtoken.compatibility import check_whole
from vtoken.config import Pipeline, PipelineLike
from vtoken.drafters.vispec import ViSpec
from vtoken.drafters.weights import load
from vtoken.errors import UnsupportedError, about
from vtoken.hooks.call.chains import ChainGenerator
from vtoken.hooks.call.drafting import Acceptance, Drafting
from vtoken.hooks.call.pairing import check_pair
from vtoken.hooks.call.vocabularies import words
from vtoken.hooks.decoder.target_attention import TargetAttention
from vtoken.hooks.decoder.target_states import TargetStates
from vtoken.hooks.state.twin import twin
from vtoken.session import SESSION, Session, session_of, unwrap, whole
from vtoken.stages.facts import of_target


@dataclass(eq=False)
class Pair:
    """A target and its draft, until one of them is unwrapped.

    Attributes:
        target, draft: the models themselves.
        before: the pipeline that the target was wrapped with; None: it was not.
    """

    target: Any
    draft: Any
    before: Pipeline | None
    drafting: Drafting

    def dissolve(self) -> None:
        """Leaves the draft unwrapped, and the target as it was before."""
        with ExitStack() as undo:
            undo.callback(self._wrap_as_before)
            for model in (self.target, self.draft):
                undo.callback(self._release, model)

    def _release(self, model: Any) -> None:
        session = session_of(model)
        if session is not None and session.pair is self:
            session.release()

    def _wrap_as_before(self) -> None:
        if self.before is not None:
            Session(self.target, self.before)


def _pair(target: Any, draft: Any, before: Pipeline | None, own: Pipeline) -> Pair:
    """Wraps target and draft, the draft with a pipeline of its `own`."""
    asked = [need for stage in own.stages for need in stage.needs() if of_target(need, stage.site)]
    recorded = TargetAttention(asked) if asked else None
    pair = Pair(target, draft, before, Drafting(draft, recorded))
    with ExitStack() as undo:
        first = Session(target, before or config.load("none"), watched=True, recorded=recorded)
        undo.callback(first.release)
        second = Session(draft, own, target=recorded, drafts_for=first.adapter)
        undo.callback(second.release)
        check_pair(first.adapter, second.adapter)
        pair.drafting.on_target(first.context)
        pair.drafting.on_draft(second.context, words(target))
        undo.pop_all()
    first.pair = second.pair = pair
    return pair


def _trained_pair(target: Any, draft: ViSpec, before: Pipeline | None) -> Pair:
    """Wraps the target of a draft with trained weights, which has no pipeline: it reads what its target's leaves."""
    recorded = TargetStates()
    pair = Pair(target, draft, before, Drafting(draft, recorded, ChainGenerator))
    with ExitStack() as undo:
        session = Session(target, before or config.load("none"), watched=True, recorded=recorded)
        undo.callback(session.release)
        pair.drafting.on_target(session.context)
        session.context.handle.set(draft, SESSION, session)
        undo.pop_all()
    session.pair = pair
    return pair


@contextmanager
def _without(session: Session | None) -> Iterator[None]:
    """Releases the session of a target before a block makes another; if that fails, the target is wrapped as before."""
    if session is not None:
        session.release()
    try:
        yield
    except BaseException:
        if session is not None:
            Session(session.adapter.model, session.pipeline)
        raise


def draft(model: Any, draft: Any = None, pipeline: PipelineLike | None = None) -> Any:
    """Makes a model that drafts for `model` and sees the pictures of its calls, under a pipeline of its own:

        assistant = vtoken.draft(model, small, "specvlm-90")
        model.generate(**inputs, assistant_model=assistant)

    First the target reads the prompt, then the draft, with its own tower, features and pruned cache. The rest is
    transformers' assisted generation, one prompt at a time. The target decides every token: greedy answers are those of
    `model` alone. A target that is wrapped answers under its own pipeline; one that is not counts as wrapped with
    `none` while it has a draft.
    `vtoken.acceptance(draft)` tells how many drafts were accepted. `vtoken.unwrap(draft)` undoes what this function did
    to both models; `vtoken.unwrap(model)` also removes the target's own pipeline.

    A draft with trained weights is given by name:

        assistant = vtoken.draft(model, "JLKang/ViSpec-Qwen2.5-VL-7B-Instruct")

    It is one decoder layer on the hidden states of the target, see `vtoken.drafters.vispec.ViSpec`.

    Args:
        model: the target, a stock VLM, wrapped or not.
        draft: another checkpoint with the same vocabulary (padding aside) and placeholders, not wrapped. None, or
            `model` itself: a second tree of modules on its weights; move or quantise `model`, or add adapters, before
            this call. A string or path: trained weights, as a safetensors file, a folder with a `model.safetensors`, or
            a repository of the Hub ("owner/name", "owner/name@revision").
        pipeline: of the draft, as `vtoken.wrap` takes it. None: the one under `draft:` in the pipeline of the wrapped
            target, else "specvlm-90". Must be None with trained weights.

    Returns:
        The draft: `draft` itself, the second tree, or the module with the trained weights.

    Raises:
        UnsupportedError: the two do not go together, a stage cannot be served, `draft` is wrapped, `model` has a draft
            or is one, a pipeline of the two has a contrast, or one is given with trained weights.
        ConfigError: the pipeline or the weights cannot be read.
    """
    target = whole(model)
    check_whole(target)
    session = session_of(target)
    if session is not None and session.pair is not None:
        raise UnsupportedError("this model has a draft, or is one; call vtoken.unwrap(draft) first")
    if session is not None and session.against is not None:
        raise UnsupportedError(
            "the pipeline of this model has a contrast, which takes one token after the other, and a draft has several "
            "checked at once; leave one of the two out"
        )
    before = None if session is None else session.pipeline
    if isinstance(draft, (str, os.PathLike)):
        if pipeline is not None:
            raise UnsupportedError(
                "a draft with trained weights has no pipeline: it reads what the target's leaves; give the pipeline to "
                "vtoken.wrap(model, pipeline) first"
            )
        adapter = registry.adapter(target.config.model_type)(target) if session is None else session.adapter
        trained = load(draft, adapter)
        with _without(session):
            return _trained_pair(target, trained, before).draft
    other = None if draft is None or whole(draft) is target else whole(draft)
    if other is not None:
        check_whole(other)
        if session_of(other) is not None:
            raise UnsupportedError(
                "this draft is wrapped already; call vtoken.unwrap(draft) first and give its pipeline to vtoken.draft"
            )
    if pipeline is None:
        pipeline = (before and before.draft) or "specvlm-90"
    own = config.load(pipeline)
    if before is not None:
        own = replace(own, anyres=before.anyres)  # both are given the same crops
    if own.contrast is not None:
        raise UnsupportedError("the pipeline of a draft can have no contrast: answers are the target's; take it out")
    with _without(session):
        # The copy is made while nothing is installed, so that it holds no hooks.
        other = twin(target) if other is None else other
        with about(own.written):
            return _pair(target, other, before, own).draft


@contextmanager
def drafting(model: Any, other: Any, pipeline: PipelineLike) -> Iterator[Any]:
    """`draft` for the duration of a with-block."""
    found = draft(model, other, pipeline)
    try:
        yield found
    finally:
        unwrap(found)


def acceptance(draft: Any) -> Acceptance:
    """What became of the tokens that this draft guessed in the last `generate` of the calling thread.

    Raises:
        UnsupportedError: the model is no draft, or has not drafted yet in this thread.
    """
    session = session_of(draft)
    if session is None or session.pair is None or session.pair.draft is not whole(draft):
        raise UnsupportedError("this model is no draft; make one by vtoken.draft(model, ...)")
    found: Acceptance | None = session.pair.drafting.call.acceptance
    if found is None:
        raise UnsupportedError("nothing was drafted yet; call model.generate(..., assistant_model=draft) first")
    return found
