"""Around the model's own feature functions: what an encoder call was given, and what it returned, in the order in which
the LLM sees it.

They are methods, not modules, so there is nothing to hook: each is shadowed on the instance by a function with its
signature (`generate` inspects it). Since transformers 5.18 `generate` calls them before the model's forward.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from vtoken.hooks.call.min_tokens import alone
from vtoken.hooks.state.context import Context
from vtoken.hooks.state.forward_state import eager
from vtoken.hooks.state.run import Encoded, FeatureCall, tokens_of
from vtoken.hooks.state.trace import StageTrace
from vtoken.stages import Fact, image_of, spec_of

Pack = Callable[[Tensor], Tensor]
SIZES = ("image_sizes", "batch_num_images")  # arguments that are read number by number, in several places


class FeatureHooks:
    """Shadows the feature functions of `adapter.outer`; each call leaves an `Encoded` in `run.encodes`."""

    def __init__(self, context: Context) -> None:
        adapter = self.adapter = context.adapter
        self.run, self.handle, self.wanted = context.run, context.handle, context.wanted
        self.min_tokens = context.min_tokens_of_tower
        for kind, name in adapter.features.items():
            self.handle.set(adapter.outer, name, self._shadow(kind, getattr(adapter.outer, name)))

    def _shadow(self, kind: str, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @eager
        @wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            run = self.run
            # Somebody who patched the model may call this after `unwrap`.
            if self.handle.released:
                return original(*args, **kwargs)
            # Qwen3-VL encodes videos through its image function.
            if run.call is not None:
                return original(*args, **{**kwargs, "return_dict": True})
            run.tower = None
            run.encodes.pop(kind, None)
            arguments = dict(signature.bind(*args, **kwargs).arguments)
            # A forward that fails leaves no prompt for features that are asked for without one.
            prompt, run.prompt = run.prompt, {}
            arguments |= arguments.pop("kwargs", {}) | prompt
            arguments |= {name: x.cpu() for name in SIZES if torch.is_tensor(x := arguments.get(name))}
            layouts, skip_plan = self.adapter.layouts(kind, arguments), run.skip_plans.pop(kind, None)
            if self.min_tokens and (skip_plan is None or len(skip_plan.images) != len(layouts)):
                skip_plan = alone(layouts, self.min_tokens)
            run.call = FeatureCall(kind, arguments, layouts, skip_plan)
            asked = kwargs.pop("return_dict", None)
            try:
                out = original(*args, return_dict=True, **kwargs)
                run.encodes[kind] = self._encode(run.call, out)
            finally:
                run.call = run.tower = None
            named = self.adapter.outer.config.return_dict if asked is None else asked
            return out if named else out.to_tuple()

        return features

    @torch.no_grad()
    def _encode(self, call: FeatureCall, out: Any) -> Encoded:
        given = out.pooler_output
        flat = [given] if torch.is_tensor(given) else list(given)
        fingerprint = torch.cat([f[..., 0].detach().flatten() for f in flat])
        # Some versions append the newline of a video only when they fill the prompt.
        if len(fingerprint) != sum(layout.tokens for layout in call.layouts):
            fingerprint = fingerprint[tokens_of(call.layouts, fingerprint.device)]
        tower = self.run.tower
        if tower is None:
            return Encoded(call.layouts, {}, fingerprint, [], counted=call.counted)

        def pack(values: Tensor) -> Tensor:
            return self.adapter.pack(call, values)

        facts = {f: pack(v[..., None])[..., 0] if scalar(f) else pack(v) for f, v in tower.facts.items()}
        encoded = Encoded(
            call.layouts,
            facts,
            fingerprint,
            tower.traces,
            tower.history,
            deep=tuple(tower.deep),
            counted=call.counted,
            resized=tower.resized,
        )
        if call.skip_reason is not None:
            encoded.stages = [replace(trace, stood_aside=call.skip_reason) for trace in tower.traces]
        if tower.history.full != tuple(layout.tokens for layout in call.layouts):
            encoded.history = None
            if encoded.stages:
                encoded.stages, encoded.absorbed_by = repacked(pack, call, tower.history.full, encoded.stages)
            encoded.places_unknown = encoded.absorbed_by is None and tower.history.slot is not None
            encoded.alive = packed_mask(pack, tower.alive())
        return encoded


def packed_mask(pack: Pack, alive: Tensor | None) -> Tensor | None:
    """[ΣN] bool of a mask over patches. An interpolated token is alive if all its sources are: NaN at patches that are
    not spreads to it."""
    if alive is None:
        return None
    marks = torch.zeros(alive.shape, device=alive.device).masked_fill(~alive, torch.nan)
    return ~pack(marks[..., None])[..., 0].isnan()


def scalar(fact: Fact) -> bool:
    """Whether the fact is one number per token."""
    spec = spec_of(fact.name, "tokens")
    return spec is not None and spec.holds == "one"


def repacked(
    pack: Pack, call: FeatureCall, full: tuple[int, ...], traces: list[StageTrace]
) -> tuple[list[StageTrace], Tensor | None]:
    """Traces of stages that saw crops and patches, brought to images and tokens, and the last `absorbed_by`.

    Tokens that the model interpolated stay if all their sources stayed; which absorbed which is then unknown (None).
    """
    exact = not any(layout.interpolated for layout in call.layouts)
    crops, patches = len(full), full[0]
    ids = torch.arange(crops * patches, dtype=torch.float32)
    channels = [ids.view(crops, patches)]
    for trace in traces:
        alive = torch.full((crops, patches), float("nan"))
        kept = torch.cat(trace.kept).cpu()
        alive[image_of([len(patch) for patch in trace.kept], kept.device), kept] = 0
        channels.append(alive)
        if trace.into is not None:
            absorbed = torch.stack(trace.into).cpu()
            ids_of = (absorbed + torch.arange(crops)[:, None] * patches).float()
            channels.append(ids_of.masked_fill(absorbed < 0, float("nan")))
    columns = iter(pack(torch.stack(channels, -1)).unbind(-1))
    tokens = [layout.tokens for layout in call.layouts]
    raster_index = torch.cat([torch.arange(n) for n in tokens])
    place_of = torch.full((crops * patches,), -1)
    first = next(columns)
    if exact:
        place_of[first.long()] = raster_index
    out: list[StageTrace] = []
    absorbed_by: Tensor | None = None
    before = tokens
    for trace in traces:
        left = [(~image.isnan()).nonzero()[:, 0] for image in next(columns).split(tokens)]
        if trace.into is not None:
            rep = next(columns)
            absorbed_by = torch.where(rep.isnan(), -1, place_of[rep.nan_to_num().long()]) if exact else None
        into = None if absorbed_by is None else list(absorbed_by.split(tokens))
        after = [len(k) for k in left]
        out.append(replace(trace, tokens_in=list(before), tokens_out=after, kept=left, into=into))
        before = after
    return out, absorbed_by
