"""One timed `generate` of a pipeline or of its oracle, see `latency`. All hooks are taken back after each."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteriaList

from vtoken.adapters.base import Adapter
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.speed.inputs import Prompt
from vtoken.evals.speed.rounds import FirstToken
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.pruned_cache import cache_bytes
from vtoken.hooks.state.run import Clock
from vtoken.session import session_of, trace, watched, wrapped


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one `generate`, and the peak of GPU memory above what was allocated before it.

    Attributes:
        vision: tower and projector, with the facts and encoder-site stages that run inside; both runs of a contrast.
        stages: the decisions themselves (for encoder-site stages part of `vision`); None without a pipeline.
        ttft: from the call to the first token, vision included.
        decode: per token after the first; None if only one is generated.
        peak_bytes: None on a CPU, where one process has no figure per call.
    """

    vision: float
    stages: float | None
    ttft: float
    decode: float | None
    end_to_end: float
    peak_bytes: int | None


@dataclass(frozen=True)
class Oracle:
    """A prompt that is short already, padded on the left; `values` are what the feature function is made to return,
    newlines included, `deep` the same of every DeepStack layer."""

    ids: Tensor  # [B, P]
    mask: Tensor  # [B, P]
    positions: Tensor  # [..., B or 1, P]
    values: Tensor  # [ΣK, D]
    deep: tuple[Tensor, ...]


@dataclass
class Subject:
    """What is measured: a pipeline (None: dense), its oracle, and their samples.

    Attributes:
        layers: visual tokens of the whole batch in every decoder layer.
        cached: bytes of the whole batch's cache after the prefill, and after every further step.
        no_oracle: why there is no oracle, or None.
        aside: stages that did nothing -> why.
        density: as in Trace.
        samples, ideal: of the pipeline, and of its oracle.
    """

    pipeline: Pipeline | None
    layers: tuple[int, ...]
    cached: tuple[int, ...]
    oracle: Oracle | None
    no_oracle: str | None
    aside: dict[str, str] = field(default_factory=dict)
    density: dict[str, float] = field(default_factory=dict)
    samples: list[Sample] = field(default_factory=list)
    ideal: list[Sample] = field(default_factory=list)


class Runner:
    """Runs one model on one prompt."""

    def __init__(self, adapter: Adapter, prompt: Prompt) -> None:
        self.adapter, self.prompt = adapter, prompt
        self.model: Any = adapter.model
        self.clock, self.cuda = Clock(self.model.device), self.model.device.type == "cuda"
        self.rope = list(inspect.signature(adapter.outer.get_rope_index).parameters) if adapter.mrope else []

    @property
    def shape(self) -> str:
        shown = {name: value for name, value in self.prompt.inputs.items() if name.startswith("pixel_values")}
        shown = {"ids": self.prompt.inputs["input_ids"], **shown}
        return ", ".join(f"{name} {list(value.shape)}" for name, value in shown.items())

    def prepare(self, pipeline: Pipeline | None) -> Subject:
        """One `generate` to learn what is kept, what enters the language model, and how large its cache is."""
        if pipeline is not None and pipeline.anyres != "model":
            raise UnsupportedError(
                f"pipeline {pipeline.name!r} sets anyres: {pipeline.anyres}, but all pipelines are measured on the "
                "same prompt, cut as the model chooses; leave the key out and give an image_size that is cut that way"
            )
        seen: dict[str, Any] = {}
        cached: list[int] = []
        handle = Handle()

        def note_prefill(module: Any, args: tuple, kwargs: dict) -> None:
            if not seen:
                session = session_of(self.model)
                seen.update(kwargs, flow=None if session is None else session.context.run.flow)

        def note_cache(module: Any, args: tuple, kwargs: dict, out: Any) -> None:
            cached.append(cache_bytes(out.past_key_values))

        with watched(self.model, pipeline or DENSE):
            # Behind vtoken's own hooks, so they see the short sequence, and a cache that shrank.
            handle.before(self.adapter.lm, note_prefill)
            handle.after(self.adapter.lm, note_cache)
            try:
                self.model.generate(**self.prompt.inputs)
            finally:
                handle.release()
            found = trace(self.model)
        layers = tuple(map(sum, found.layers))
        if pipeline is None:
            return Subject(None, layers, tuple(cached), None, None)
        reason = self._no_oracle(pipeline)
        oracle = None if reason else self._shorten(seen)
        return Subject(pipeline, layers, tuple(cached), oracle, reason, found.aside, found.density)

    def _no_oracle(self, pipeline: Pipeline) -> str | None:
        """Why no short prompt is equivalent, or None."""
        if pipeline.contrast is not None and pipeline.contrast.alpha:
            return "its contrast runs the model once more, with a cache of its own that is not counted here"
        inside = [f"{stage.name} acts at site {stage.site}" for stage in pipeline.stages if stage.site != "tokens"]
        if inside:
            return f"no short prompt is equivalent: {', '.join(inside)}"
        if self.adapter.masks_outside or self.adapter.encoder.by_rows:
            return "no short prompt is built: the model makes masks or row breaks of the ids of the whole prompt"
        new = "mm_encoder_outputs" in inspect.signature(self.adapter.outer.forward).parameters
        own = hasattr(self.adapter.outer, "image_newline")
        if self.prompt.kind == "video" and self.prompt.newlines and own and not new:
            return "before transformers 5.18 the model itself puts a newline after every video"
        return None

    def _shorten(self, seen: dict[str, Any]) -> Oracle:
        """The prompt that would have given the language model what it saw."""
        x, mask, full = seen["inputs_embeds"], seen.get("attention_mask"), self.prompt.inputs["input_ids"]
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
        flow = seen["flow"]
        ids = full if flow is None else full.gather(1, flow.index)
        # The last id is text: what pads the rows on the left must not be taken for a picture.
        ids = torch.where(mask.bool(), ids, full[:, -1:])
        visual = self.adapter.visual_kinds(ids, None) > 0
        deep = tuple(layer.clone() for layer in seen.get("deepstack_visual_embeds") or ())
        return Oracle(ids, mask, seen["position_ids"].clone(), x[visual], deep)

    @contextmanager
    def _short(self, oracle: Oracle | None) -> Iterator[None]:
        """The feature function runs in full, and returns what the oracle keeps."""
        if oracle is None:
            yield
            return
        outer, name = self.adapter.outer, self.adapter.features[self.prompt.kind]
        original: Callable[..., Any] = getattr(outer, name)
        replaced: list[Any] = []

        @wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            out = original(*args, **kwargs)
            # `generate` keeps them until it ends: memory that is in use is part of the price.
            replaced[:] = [out.pooler_output]
            per_video = isinstance(out.pooler_output, Tensor)
            out.pooler_output = oracle.values[None] if per_video else (oracle.values,)
            if oracle.deep:
                replaced.append(out.deepstack_features)
                per_image = not isinstance(out.deepstack_features[0], Tensor)
                out.deepstack_features = [(layer,) if per_image else layer for layer in oracle.deep]
            return out

        handle = Handle()
        handle.set(outer, name, features)
        try:
            yield
        finally:
            handle.release()

    def round(self, subject: Subject, *, oracle_first: bool, count: bool) -> None:
        """One sample of the subject and, next to it, one of its oracle."""
        jobs: list[tuple[list[Sample], Pipeline | None, Oracle | None]] = [(subject.samples, subject.pipeline, None)]
        if subject.oracle is not None:
            jobs.insert(0 if oracle_first else 1, (subject.ideal, None, subject.oracle))
        for samples, pipeline, oracle in jobs:
            sample, _ = self.sample(pipeline, oracle)
            if count:
                samples.append(sample)

    def sample(self, pipeline: Pipeline | None = None, oracle: Oracle | None = None) -> tuple[Sample, Tensor]:
        """One timed `generate`, and all ids it returns. Timing hooks sit outside vtoken's."""
        began: list[Any] = []
        ended: list[Any] = []
        handle, first = Handle(), FirstToken(self.clock.now)

        def projected(*_: Any) -> None:
            ended[len(began) - 1 :] = [self.clock.now()]  # a projector may be called crop by crop

        for tower in (self.adapter.tower, *(twin for twin, _ in self.adapter.encoder.twins)):
            handle.before(tower, lambda *_: began.append(self.clock.now()))
        try:
            with wrapped(self.model, pipeline) if pipeline else self._short(oracle):
                # Wrapping scans packages and leaves caches cold, which no second call on a wrapped model finds.
                self._call(oracle, max_new_tokens=1)
                began.clear()
                session = session_of(self.model)
                # A contrast encodes the picture once more; its modules took the hooks of the towers along.
                against = [] if session is None or session.against is None else [session.against.adapter]
                for adapter in (self.adapter, *against):
                    handle.after(adapter.projectors[0], projected)
                resident = self._resident()
                start = self.clock.now()
                ids = self._call(oracle, stopping_criteria=StoppingCriteriaList([first]))
                end = self.clock.now()
                self.clock.wait()
                peak = torch.cuda.max_memory_allocated(self.model.device) - resident if self.cuda else None
                stages = trace(self.model).stages if pipeline and pipeline.stages else []
                decisions = sum(stage.milliseconds for stage in stages) if pipeline else None
        finally:
            handle.release()
        steps = self.model.generation_config.max_new_tokens - 1
        timed = Sample(
            vision=sum(self.clock.between(*pair) for pair in zip(began, ended, strict=True)),
            stages=decisions,
            ttft=self.clock.between(start, first.at),
            decode=self.clock.between(first.at, end) / steps if steps else None,
            end_to_end=self.clock.between(start, end),
            peak_bytes=peak,
        )
        return timed, ids

    def _call(self, oracle: Oracle | None, **options: Any) -> Tensor:
        inputs = dict(self.prompt.inputs)
        if oracle is not None:
            if self.adapter.mrope:
                # The oracle's positions are given; what `generate` spends on them is paid all the same.
                self.adapter.outer.get_rope_index(**{name: inputs[name] for name in self.rope if name in inputs})
                del inputs["mm_token_type_ids"]
            inputs |= {"input_ids": oracle.ids, "attention_mask": oracle.mask, "position_ids": oracle.positions}
        return self.model.generate(**inputs, **options)

    def _resident(self) -> int:
        """Bytes allocated on the GPU when it has nothing left to do; the peak is counted from here on."""
        if not self.cuda:
            return 0
        self.clock.wait()
        torch.cuda.reset_peak_memory_stats(self.model.device)
        return torch.cuda.memory_allocated(self.model.device)
