"""Assisted generation with a draft that sees: transformers' own loop, which hands a draft no pictures, is given a
candidate generator that does."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import DynamicCache
from transformers.generation.candidate_generator import AssistedCandidateGenerator

from vtoken.errors import UnsupportedError
from vtoken.hooks.call.vocabularies import known, one_vocabulary, resized_logits, words
from vtoken.hooks.state.context import Context

# Arguments of `generate` that are about the target's call alone; the draft's are made anew.
OWN = frozenset(
    "input_ids inputs_embeds past_key_values position_ids cache_position attention_mask labels use_cache "
    "logits_to_keep mm_encoder_outputs rope_deltas return_dict output_attentions output_hidden_states".split()
)


@dataclass
class Acceptance:
    """What became of the drafts of one `generate`.

    Attributes:
        drafted: tokens that the draft proposed; accepted: those of them that the target gave too.
        steps: forwards of the target that verified drafts; the prefill, which gives the first token, is none.
        tokens: how many tokens these steps gave.
    """

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    tokens: int = 0

    @property
    def share(self) -> float:
        """Share of the drafted tokens that were accepted; nan where nothing was drafted."""
        return self.accepted / self.drafted if self.drafted else float("nan")

    @property
    def per_step(self) -> float:
        """Tokens per step of the target; nan without any."""
        return self.tokens / self.steps if self.steps else float("nan")

    def note(self, drafts: Tensor, said: Tensor) -> None:
        """One step: the target was given drafts [n] and gave tokens [m]."""
        n = min(len(said), len(drafts))
        self.drafted += len(drafts)
        self.accepted += int((said[:n].to(drafts.device) == drafts[:n]).long().cumprod(0).sum())
        self.steps += 1
        self.tokens += len(said)


class _Call(threading.local):
    """Of the calling thread: which arguments of the target's `generate` the draft takes too, whether the draft is
    running for it, and what became of the drafts."""

    given: dict[str, Any] | None = None
    at_work: bool = False
    acceptance: Acceptance | None = None


class Drafting:
    """What joins a target and its draft. `on_target` and `on_draft` install hooks on either.

    Args:
        draft: the model that drafts.
        recorded: what it asks about the target, if anything.
        generator: makes the guesses: a candidate generator of transformers; None: `Seeing`.
    """

    def __init__(self, draft: Any, recorded: Any = None, generator: Any = None) -> None:
        self.draft, self.recorded, self.generator, self.call = draft, recorded, generator or Seeing, _Call()
        self.parted = False  # whether the draft's cache holds key heads in classes
        self.names = frozenset(inspect.signature(draft.forward).parameters) - OWN

    def on_target(self, context: Context) -> None:
        model, handle = context.adapter.model, context.handle
        handle.set(model, "generate", self._generate(model.generate))
        handle.set(model, "_get_candidate_generator", self._candidates(model._get_candidate_generator))
        if words(model) != words(self.draft):
            handle.set(model, "_validate_generation_mode", one_vocabulary(model._validate_generation_mode, self.draft))

    def on_draft(self, context: Context, size: int) -> None:
        """`size`: vocabulary size of the target."""
        self.parted = any(getattr(stage, "in_classes", False) for stage in context.stages)
        context.handle.set(self.draft, "generate", self._only_here(self.draft.generate))
        if words(self.draft) != size:
            context.handle.after(self.draft, resized_logits(size))

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("assistant_model") is not self.draft:
                return original(inputs, *args, **kwargs)
            check_call(inputs, kwargs, self.generator.encodes)
            self.call.given, self.call.acceptance = {k: v for k, v in kwargs.items() if k in self.names}, Acceptance()
            try:
                with nullcontext() if self.recorded is None else self.recorded.listening():
                    return original(inputs, *args, **kwargs)
            finally:
                self.call.given = None

        return generate

    def _candidates(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def get(*args: Any, **kwargs: Any) -> Any:
            if kwargs.get("assistant_model") is not self.draft or self.call.given is None:
                return original(*args, **kwargs)
            if kwargs.get("assistant_tokenizer") is not None:
                raise UnsupportedError(
                    "a draft that sees shares its target's ids: leave tokenizer and assistant_tokenizer out"
                )
            given = {name: kwargs.get(name) for name in ("input_ids", "generation_config", "logits_processor")}
            return self.generator(self, kwargs["model_kwargs"], given)

        return get

    def _only_here(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            if getattr(kwargs.get("generation_config"), "is_assistant", False) and not self.call.at_work:
                raise UnsupportedError(
                    "this draft was made for another target, or its target was unwrapped since: here it would be "
                    "handed no pictures; call vtoken.draft(target, draft, ...) for this one"
                )
            return original(*args, **kwargs)

        return generate

    @contextmanager
    def at_work(self, *, reads: bool) -> Iterator[None]:
        """While the draft runs for its target; `reads`: it reads the prompt."""
        self.call.at_work = True
        try:
            with self.recorded.asking() if reads and self.recorded is not None else nullcontext():
                yield
        finally:
            self.call.at_work = False


def check_call(inputs: Tensor | None, kwargs: dict[str, Any], encodes: bool) -> None:
    """Refuses calls in which the draft could not be given what the target sees. `encodes`: the draft has a tower.

    Raises:
        UnsupportedError: says what to pass instead.
    """
    past = kwargs.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise UnsupportedError(
            "a draft has read nothing of an earlier turn, and its pictures are not in this call; pass the whole "
            "conversation with all its pictures instead of past_key_values, or leave assistant_model out"
        )
    if encodes and (kwargs.get("mm_encoder_outputs") or kwargs.get("inputs_embeds") is not None):
        raise UnsupportedError(
            "a draft encodes the pictures with a tower of its own: pass input_ids and pixel_values instead of "
            "mm_encoder_outputs or inputs_embeds"
        )
    if kwargs.get("input_ids", inputs) is None:
        raise UnsupportedError("a draft reads the prompt itself: pass input_ids")


class Seeing(AssistedCandidateGenerator):
    """First the target reads the prompt alone, then the draft does, with pictures; from then on the draft runs ahead.

    Args:
        drafting: joins target and draft.
        model_kwargs: of the target's loop; given: what else transformers hands to a candidate generator.
    """

    encodes: ClassVar[bool] = True

    def __init__(self, drafting: Drafting, model_kwargs: dict[str, Any], given: dict[str, Any]) -> None:
        mask = model_kwargs.get("attention_mask")
        # Without one `generate` would take a padding id that the target has said for padding.
        kept = {"attention_mask": torch.ones_like(given["input_ids"]) if mask is None else mask}
        kept |= {name: model_kwargs[name] for name in ("use_cache",) if name in model_kwargs}
        super().__init__(assistant_model=drafting.draft, model_kwargs=kept, **given)
        self.drafting, self.asked, self.drafts = drafting, False, given["input_ids"][:, :0]
        self.prompt = given["input_ids"].shape[1]

    def get_candidates(self, input_ids: Any, **kwargs: Any) -> Any:
        self.drafts = input_ids[:, :0]
        if not self.asked:
            self.asked = True
            return input_ids, None
        found, logits = super().get_candidates(known(input_ids, words(self.assistant_model)), **kwargs)
        self.drafts, self.before = found[:, input_ids.shape[1] :], input_ids.shape[1]
        return torch.cat([input_ids.to(found.device), self.drafts], dim=1), logits

    def update_candidate_strategy(self, input_ids: Any, scores: Any, num_matches: int) -> None:
        if self.drafting.call.acceptance is not None and self.drafts.shape[1]:
            self.drafting.call.acceptance.note(self.drafts[0], input_ids[0, self.before :])
        if scores.shape[1] > 1:  # the target's own prefill says nothing about drafts
            super().update_candidate_strategy(input_ids, scores, num_matches)

    def _generate_candidates(self, generation_args: dict[str, Any]) -> Any:
        reads = self.assistant_kwargs.get("past_key_values") is None
        with self.drafting.at_work(reads=reads):
            return self._read(generation_args) if reads else super()._generate_candidates(generation_args)

    def _read(self, generation_args: dict[str, Any]) -> Any:
        """The first drafts: the draft is given the prompt with its pictures, as in a call of its own."""
        kept, length = self.assistant_kwargs, generation_args[self.input_ids_key].shape[1]
        cache = DynamicCache(config=self.assistant_model.config.get_text_config(decoder=True))
        cache.activate_past_recording()
        layers: list[Any] = cache.layers
        for each in layers:
            each.record_past = True  # where a stage lets tokens leave as drafts grow, some may be taken back
        given = {name: self._own(value, length) for name, value in (self.drafting.call.given or {}).items()}
        mask = kept["attention_mask"]
        more: dict[str, Any] = {"attention_mask": pad(mask, (0, length - mask.shape[1]), value=1)}
        if self.drafting.parted:
            # The token after the prompt may be taken back too, so it must not count as a part of it.
            more["logits_to_keep"] = 2
        self.assistant_kwargs = {**kept, **given, **more, "past_key_values": cache}
        # transformers hands no pictures to what it knows to be an assistant.
        self.generation_config.update(is_assistant=False)
        try:
            found = super()._generate_candidates(generation_args)
            self.assistant_kwargs = {**kept, "past_key_values": self.assistant_kwargs["past_key_values"]}
        finally:
            self.generation_config.update(is_assistant=True)
        return found

    def _own(self, value: Any, length: int) -> Any:
        """An argument on the draft's device and, if floating, in its dtype; one with an integer per token of the prompt
        is padded with 0 (text) for the token after it."""
        if not isinstance(value, Tensor):
            return value
        value = value.to(self.assistant_model.device)
        if value.is_floating_point():
            return value.to(self.assistant_model.dtype)
        tells = value.ndim == 2 and value.shape[1] == self.prompt and value.dtype in (torch.int64, torch.int32)
        return pad(value, (0, length - self.prompt)) if tells else value
