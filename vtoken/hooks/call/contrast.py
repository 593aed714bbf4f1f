"""Contrastive decoding: every token's logits are compared with those of the same model under another pipeline, which
has a cache of its own."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from math import log
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from vtoken.errors import UnsupportedError
from vtoken.hooks.call.drafting import OWN
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.handle import Handle

DRAFTS = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Contrasting:
    """Makes `generate` of a model contrast its logits with those of another pipeline.

    Args:
        handle: writes to the model that answers; model: that model.
        other: context of the same model under the other pipeline.
        alpha, beta: see `Against`.
    """

    def __init__(self, handle: Handle, model: Any, other: Context, alpha: float, beta: float) -> None:
        self.model, self.other, self.alpha, self.beta = model, other, alpha, beta
        self.turn = threading.Lock()
        self.names = frozenset(inspect.signature(other.adapter.model.forward).parameters) - OWN
        # How the model generates by itself (no cache, in chunks, ...) is not how it is asked for one token's logits.
        other.handle.set(other.adapter.model, "generation_config", GenerationConfig())
        handle.set(model, "generate", self._generate(model.generate))

    def _generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        names = list(inspect.signature(original).parameters)

        @wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            given = dict(zip(names, args, strict=False)) | kwargs
            ids = given.get("input_ids", given.get("inputs"))
            if ids is None:
                raise UnsupportedError(
                    "the pipeline's contrast reads the prompt: pass input_ids and pixel_values, not inputs_embeds"
                )
            check_call(given, given.get("generation_config") or self.model.generation_config)
            seen = {name: value for name, value in given.items() if name in self.names}
            beams = given.get("num_beams") or getattr(given.get("generation_config"), "num_beams", None)
            beams = beams or self.model.generation_config.num_beams or 1
            mask = given.get("attention_mask")
            ours = Against(self.other, self.turn, ids, mask, seen, self.alpha, self.beta, beams=beams > 1)
            kwargs = given | {"logits_processor": LogitsProcessorList([ours, *(given.get("logits_processor") or [])])}
            return original(**kwargs)

        return generate


def check_call(given: dict[str, Any], config: Any) -> None:
    """Refuses calls for which the other pipeline could not be given what the model has seen.

    Raises:
        UnsupportedError: says what to do instead.
    """
    if drafts := [name for name in DRAFTS if given.get(name) or getattr(config, name, None)]:
        raise UnsupportedError(
            f"the pipeline's contrast takes one token after the other, and {drafts[0]} checks several at once; leave "
            "one of the two out"
        )
    past = given.get("past_key_values")
    if past is not None and past.get_seq_length():
        raise UnsupportedError(
            "the pipeline's contrast has read nothing of an earlier turn; pass the whole conversation with all its "
            "pictures instead of past_key_values"
        )
    if given.get("mm_encoder_outputs") or given.get("inputs_embeds") is not None:
        raise UnsupportedError(
            "the pipeline's contrast encodes the pictures itself: pass input_ids and pixel_values instead of "
            "mm_encoder_outputs or inputs_embeds"
        )


class Against(LogitsProcessor):
    """(1 + alpha) l - alpha l', where l are a token's logits and l' the other pipeline's; words with l below
    ln beta + max l get -inf (none does where beta is 0).

    Args:
        context: of the model under the other pipeline; turn: a lock while that runs, since the model
            remembers positions (`rope_deltas`) of one call only.
        ids, mask: [B, L] of the prompt; given: the other arguments of the call that describe it, such as pictures.
        beams: rows are beams, which may be reordered between two tokens, and scores must be log-probabilities.
    """

    def __init__(
        self,
        context: Context,
        turn: threading.Lock,
        ids: Tensor,
        mask: Tensor | None,
        given: dict[str, Any],
        alpha: float,
        beta: float,
        *,
        beams: bool,
    ) -> None:
        self.context, self.turn, self.ids, self.mask, self.given = context, turn, ids, mask, given
        self.alpha, self.beta, self.beams = alpha, beta, beams
        self.cache: Any = None
        self.prompts, self.rows = len(ids), ids  # how many there are; ids that the cache holds
        self.deltas: Tensor | None = None  # what the model remembers of positions, for all rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        other = (self._read(len(input_ids)) if self.cache is None else self._step(input_ids)).to(scores)
        out = (1 + self.alpha) * scores - self.alpha * other
        if self.beta:
            out = out.masked_fill(scores < log(self.beta) + scores.amax(-1, keepdim=True), -torch.inf)
        self.rows = input_ids
        return out.log_softmax(-1) if self.beams else out

    def _read(self, rows: int) -> Tensor:
        """[rows, V] logits after the prompt, which is read once for all rows (beams, samples) that continue it."""
        logits = self._run(self.ids, self.mask, self.given)
        copies = rows // len(self.ids)
        if copies > 1:
            # By reordering, which states of layers without attention can do too.
            self.cache.reorder_cache(torch.arange(len(self.ids), device=logits.device).repeat_interleave(copies))
            logits = logits.repeat_interleave(copies, 0)
            self.deltas = None if self.deltas is None else self.deltas.repeat_interleave(copies, 0)
            self.given = {k: v.repeat_interleave(copies, 0) if self._tells(v) else v for k, v in self.given.items()}
            self.ids = self.ids.repeat_interleave(copies, 0)
            self.mask = None if self.mask is None else self.mask.repeat_interleave(copies, 0)
        return logits

    def _step(self, input_ids: Tensor) -> Tensor:
        """[rows, V] logits after one more token."""
        if self.beams:
            self._reorder(input_ids)
        more = input_ids.shape[1] - self.ids.shape[1]
        mask = None if self.mask is None else pad(self.mask, (0, more), value=1)
        # What tells of every token of the prompt tells of later ones that they are text.
        more_given = {name: pad(value, (0, more)) for name, value in self.given.items() if self._tells(value)}
        return self._run(input_ids, mask, more_given)

    def _tells(self, value: Any) -> bool:
        """Whether an argument tells of every token of the prompt."""
        if not isinstance(value, Tensor) or value.is_floating_point() or value.ndim != 2:
            return False
        return value.shape[1] == self.ids.shape[1]

    def _reorder(self, input_ids: Tensor) -> None:
        """Reorders the cache as beam search reordered its rows: each takes the state of a row of its prompt that had
        the same ids before the newest (UnsupportedError where none had). Asks the device."""
        copies = torch.arange(len(input_ids), device=input_ids.device) // (len(input_ids) // self.prompts)
        alike = (input_ids[:, None, :-1] == self.rows[None]).all(-1) & (copies[:, None] == copies[None])
        if not bool(alike.any(1).all()):
            raise UnsupportedError(
                "the pipeline's contrast follows beams by what they said, and one said what none before it did; use "
                "plain beam search, or num_beams=1"
            )
        order = alike.long().argmax(1)
        if order.tolist() != list(range(len(order))):
            self.cache.reorder_cache(order)

    def _run(self, ids: Tensor, mask: Tensor | None, given: dict[str, Any]) -> Tensor:
        """[rows, V] logits after these ids; the cache takes what it does not hold of them."""
        cached = {} if self.cache is None else {"past_key_values": self.cache}
        shown = {} if mask is None else {"attention_mask": mask}
        remembered: AbstractContextManager[Any] = nullcontext()
        if self.deltas is not None:
            remembered = self.context.handle.during(self.context.adapter.outer, "rope_deltas", self.deltas)
        with self.turn, remembered:
            out = self.context.adapter.model.generate(
                input_ids=ids,
                **shown,
                **given,
                **cached,
                max_new_tokens=1,
                do_sample=False,
                num_beams=1,
                num_return_sequences=1,
                output_logits=True,
                return_dict_in_generate=True,
            )
            if self.cache is None:
                self.deltas = vars(self.context.adapter.outer).get("rope_deltas")
        self.cache = out.past_key_values
        logits: Tensor = out.logits[0]
        return logits
