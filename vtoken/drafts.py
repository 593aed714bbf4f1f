"""The entry point `draft`: a model that drafts for another, and sees what it sees."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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


class Pair:
    """A target and its draft, until one of them is unwrapped.

    Args:
        target, draft: the models themselves.
        before: the pipeline that the target is wrapped with; None: it is not.
        own: the draft's pipeline.
    """

    def __init__(self, target: Any, draft: Any, before: Pipeline | None, own: Pipeline) -> None:
        self.target, self.draft, self.before = target, draft, before
        asked = [need for stage in own.stages for need in stage.needs() if of_target(need, stage.site)]
        recorded = TargetAttention(asked) if asked else None
        self.drafting = Drafting(draft, recorded)
        sessions: list[Session] = []
        try:
            sessions.append(Session(target, before or config.load("none"), watched=True, recorded=recorded))
            sessions.append(Session(draft, own, target=recorded, drafts_for=sessions[0].adapter))
            check_pair(sessions[0].adapter, sessions[1].adapter)
            self.drafting.on_target(sessions[0].context)
            self.drafting.on_draft(sessions[1].context, words(target))
        except BaseException:
            for session in reversed(sessions):
                session.release()
            self._restore()
            raise
        for session in sessions:
            session.pair = self

    def dissolve(self) -> None:
        """Leaves the draft unwrapped, and the target as it was before."""
        for model in (self.draft, self.target):
            session = session_of(model)
            if session is not None and session.pair is self:
                session.release()
        self._restore()

    def _restore(self) -> None:
        if self.before is not None:
            Session(self.target, self.before)


class TrainedPair(Pair):
    """A target and a draft with trained weights, which has no pipeline: it reads what the target's leaves.

    Args:
        target, draft, before: as in `Pair`.
    """

    def __init__(self, target: Any, draft: ViSpec, before: Pipeline | None) -> None:
        self.target, self.draft, self.before = target, draft, before
        recorded = TargetStates()
        self.drafting = Drafting(draft, recorded, ChainGenerator)
        try:
            session = Session(target, before or config.load("none"), watched=True, recorded=recorded)
        except BaseException:
            self._restore()
            raise
        session.pair = self
        self.drafting.on_target(session.context)
        session.context.handle.set(draft, SESSION, session)


def draft(model: Any, draft: Any = None, pipeline: PipelineLike | None = None) -> Any:
    """Makes a model that drafts for `model` and sees the pictures of its calls, under a pipeline of its own:

        assistant = vtoken.draft(model, small, "specvlm-90")
        model.generate(**inputs, assistant_model=assistant)

    The target reads the prompt, then the draft does, with its own tower, its own features and its own pruned cache;
    from then on it is transformers' assisted generation, one prompt at a time. Every token is the target's: greedy
    answers are those of `model` alone. A target may be wrapped before, and then answers as it does under its pipeline;
    one that is not counts as wrapped with `none` while it has a draft.
    `vtoken.acceptance(draft)` tells what became of the drafts. `vtoken.unwrap` of the draft takes back what this did to
    both; of the target, its own pipeline too.

    A draft with trained weights is named instead of given:

        assistant = vtoken.draft(model, "JLKang/ViSpec-Qwen2.5-VL-7B-Instruct")

    It is one decoder layer on the hidden states of the target, see `vtoken.drafters.vispec.ViSpec`.

    Args:
        model: the target, a stock VLM, wrapped or not.
        draft: another checkpoint with the same vocabulary (padding aside) and placeholders, not wrapped. None: the same
            model, in a second tree of modules on the same weights; move it, quantise it and add adapters before. A
            string or path: trained weights, as a safetensors file, a folder with a `model.safetensors`, or a repository
            of the Hub ("owner/name", "owner/name@revision").
        pipeline: of the draft, as `vtoken.wrap` takes it. None: what stands under `draft:` in the pipeline of the
            wrapped target; "specvlm-90" if nothing does. Trained weights take none.

    Returns:
        The draft: `draft` itself, the second tree, or the module with the trained weights.

    Raises:
        UnsupportedError: the two do not go together, a stage cannot be served, `draft` is wrapped, or `model` has a
            draft already, or a contrast.
        ConfigError: the pipeline or the weights do not read.
    """
    target = whole(model)
    check_whole(target)
    held = session_of(target)
    if held is not None and held.pair is not None:
        raise UnsupportedError("this model has a draft, or is one; call vtoken.unwrap(draft) first")
    if held is not None and held.against is not None:
        raise UnsupportedError(
            "the pipeline of this model has a contrast, which takes one token after the other, and a draft has several "
            "checked at once; leave one of the two out"
        )
    before = None if held is None else held.pipeline
    if isinstance(draft, (str, os.PathLike)):
        if pipeline is not None:
            raise UnsupportedError(
                "a draft with trained weights has no pipeline: it reads what the target's leaves; give the pipeline to "
                "vtoken.wrap(model, pipeline) first"
            )
        adapter = registry.adapter(target.config.model_type)(target) if held is None else held.adapter
        trained = load(draft, adapter)
        if held is not None:
            held.release()
        return TrainedPair(target, trained, before).draft
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
    if held is not None:
        held.release()
    try:
        # Made while nothing is installed, so that nothing of it comes along.
        other = twin(target) if other is None else other
    except BaseException:
        if before is not None:
            Session(target, before)
        raise
    with about(own.written):
        return Pair(target, other, before, own).draft


@contextmanager
def drafting(model: Any, other: Any, pipeline: PipelineLike) -> Iterator[Any]:
    """`draft` for the duration of a with-block."""
    found = draft(model, other, pipeline)
    try:
        yield found
    finally:
        unwrap(found)


def acceptance(draft: Any) -> Acceptance:
    """What became of the drafts in the last `generate` of the calling thread.

    Raises:
        UnsupportedError: the model drafts for none, or has not drafted yet.
    """
    session = session_of(draft)
    if session is None or session.pair is None or session.pair.draft is not whole(draft):
        raise UnsupportedError("this model is no draft; make one by vtoken.draft(model, ...)")
    found: Acceptance | None = session.pair.drafting.call.acceptance
    if found is None:
        raise UnsupportedError("nothing was drafted yet; call model.generate(..., assistant_model=draft) first")
    return found
