"""What only the calls around the language model know: labels, drafts, which positions are visual, which prompts run
dense, and when a call is over."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, NoReturn

from torch import Tensor, nn

from vtoken.errors import UnsupportedError, warn
from vtoken.hooks.call.min_tokens import MinTokensGuard, newest, pictured
from vtoken.hooks.state.cache_argument import cache_of
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.image_spans import HIDDEN
from vtoken.hooks.state.pruned_cache import check_owner
from vtoken.hooks.state.run import UNSEEN


def refuse_batching(*args: Any, **kwargs: Any) -> NoReturn:
    """In place of the model's `init_continuous_batching`, by which `generate_batch` goes too.

    Raises:
        UnsupportedError: always.
    """
    raise UnsupportedError(
        "continuous batching of transformers takes token ids without pictures and packs requests into one row on a "
        "paged cache, so this model's pipeline would do nothing; call generate with a batch, or vtoken.unwrap(model) "
        "first for prompts without pictures"
    )


class CallInputs:
    """Hooks on the model and on `outer` (which sees ids); what they find goes to the run. They record nothing on
    decode steps, which may be compiled."""

    def __init__(self, context: Context) -> None:
        adapter, handle = context.adapter, context.handle
        self.acts, self.warned = bool(context.stages), False
        self.adapter, self.run, self.handle, self.owner = adapter, context.run, handle, context.owner
        self.guard = MinTokensGuard(context) if context.min_tokens_of_tower else None
        handle.set(adapter.model, "generate", self._shadow(adapter.model.generate))
        prepare = adapter.model.prepare_inputs_for_generation
        handle.set(adapter.model, "prepare_inputs_for_generation", self._prepared(prepare))
        if self.acts and hasattr(adapter.model, "init_continuous_batching"):
            handle.set(adapter.model, "init_continuous_batching", refuse_batching)
        if hasattr(adapter.outer, "get_rope_index"):
            handle.set(adapter.outer, "get_rope_index", self._placed(adapter.outer.get_rope_index))
        handle.before(adapter.model, self._call)
        handle.before(adapter.outer, self._outer)

    def _shadow(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def generate(inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
            if self.handle.released:
                return original(inputs, *args, **kwargs)
            ids, embeds = kwargs.get("input_ids", inputs), kwargs.get("inputs_embeds")
            self.run.begin()
            self._read(ids, embeds, kwargs, ahead=True)
            if self.guard is not None and pictured(kwargs) and (ids is not None or embeds is not None):
                self.guard.ahead(ids, embeds, kwargs)
            outermost, self.run.generating = not self.run.generating, True
            try:
                return original(inputs, *args, **kwargs)
            finally:
                if outermost:
                    self.run.generating = False
                    self.run.forget()
                    self.handle.switch.off()

        return generate

    def _prepared(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Notes the padding of the prompt, which cannot be read from the mask over slots made for a static cache."""

        @wraps(original)
        def prepare_inputs_for_generation(*args: Any, **kwargs: Any) -> Any:
            self.run.padding = kwargs.get("attention_mask")
            return original(*args, **kwargs)

        return prepare_inputs_for_generation

    def _placed(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Names the cause where the model cannot number rows and columns as its mask hides visual tokens."""
        signature = inspect.signature(original)

        @eager
        @wraps(original)
        def get_rope_index(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except (RuntimeError, IndexError) as error:
                given = signature.bind(*args, **kwargs).arguments
                ids, mask = given.get("input_ids"), given.get("attention_mask")
                if ids is None or mask is None:
                    raise
                if not bool(((self.adapter.visual_kinds(ids, None) > 0) & (mask == 0)).any()):
                    raise
                raise UnsupportedError(HIDDEN) from error

        return get_rope_index

    def _read(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict, *, ahead: bool = False) -> None:
        """Leaves the prompt to families whose feature functions need it. `ahead`: earlier turns may be in it."""
        given = embeds if ids is None else ids
        if self.adapter.prompted and pictured(kwargs) and given is not None:
            last = newest(ids, embeds, kwargs) if ahead else 0
            self.run.prompt = {"inputs_embeds" if ids is None else "input_ids": given[:, -last:]}

    def _call(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        ids = kwargs.get("input_ids")
        if ids is None or ids.shape[1] > 1:
            self._asked(kwargs)

    @eager
    def _asked(self, kwargs: dict) -> None:
        wanted = kwargs.get("logits_to_keep")
        self.run.labels = kwargs.get("labels")
        self.run.tail = wanted - 1 if type(wanted) is int and wanted > 1 else 0

    def _outer(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        """Reads the ids, which cannot be seen any more inside the language model."""
        ids = args[0] if args else kwargs.get("input_ids")
        embeds = kwargs.get("inputs_embeds")
        given = embeds if ids is None else ids
        if self.adapter.masks_outside and not isinstance(kwargs.get("attention_mask"), dict):
            self._padded(kwargs)
        if given is not None and given.shape[1] > 1:
            self._see(ids, embeds, kwargs)

    @eager
    def _padded(self, kwargs: dict) -> None:
        """Notes the 2D mask before the model makes others of it, which are all that the language model sees."""
        check_owner(cache_of(kwargs), self.owner)
        self.run.mask = kwargs.get("attention_mask")

    @eager
    def _see(self, ids: Tensor | None, embeds: Tensor | None, kwargs: dict) -> None:
        self.run.begin()
        self.adapter.check_call(kwargs)
        self.run.mask, self.run.blocks = kwargs.get("attention_mask"), self.adapter.blocks(kwargs)
        self._read(ids, embeds, kwargs)
        pixels = pictured(kwargs)
        given = {*pixels, *(kind for kind, v in (kwargs.get("mm_encoder_outputs") or {}).items() if v is not None)}
        self.run.unseen = ids is None and not given
        if self.run.unseen and self.acts and not self.warned:
            self.warned = True
            warn(f"{UNSEEN}: they keep all their tokens. Pass input_ids and pixel_values. This is said once per wrap")
        # A placeholder that somebody typed, without a picture of its kind, is a word.
        self.run.kinds = self.adapter.visual_kinds(ids, embeds, given) if given else None
        if pixels and self.guard is not None:
            self.guard.look(self.run.kinds, kwargs)
