"""One timed `generate` of a pipeline or of its oracle, see `vtoken.evals.latency`. All hooks are taken back after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from vtoken.adapters.base import Adapter
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.hooks.handle import Handle
from vtoken.wrap import trace, wrapped


@dataclass(frozen=True)
class Sample:
    """Milliseconds of one `generate`, and the peak of GPU memory above what was allocated before it.

    Attributes:
        vision: tower and projector, with the facts and encoder-site stages that run inside.
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
class Prompt:
    """Random text, then all pictures, then `tail` tokens of text; every row alike, nothing padded."""

    inputs: dict[str, Tensor]
    head: int
    tail: int


@dataclass(frozen=True)
class Oracle:
    """A prompt that is short already: ids and 2D mask [B, P], kept features [ΣK, D], positions [..., B or 1, P]."""

    ids: Tensor
    visual: Tensor
    values: Tensor
    mask: Tensor
    positions: Tensor


@dataclass
class Subject:
    """What is measured: a pipeline (None: dense), its oracle, and their samples."""

    pipeline: Pipeline | None
    visual_tokens: int
    kv_bytes: int
    oracle: Oracle | None
    no_oracle: str | None
    samples: list[Sample] = field(default_factory=list)
    ideal: list[Sample] = field(default_factory=list)


def random_prompt(adapter: Adapter, batch: int, images: int, text_tokens: int, seed: int) -> Prompt:
    """Prompts of text_tokens random ids and `images` random pictures of the model's own size.

    Raises:
        UnsupportedError: a family whose inputs are more than ids and square pictures.
    """
    model: Any = adapter.model
    config, device = model.config, model.device
    if config.model_type != "llava":
        raise UnsupportedError(
            f"no random prompts for model_type {config.model_type!r}; bench a LLaVA-1.5 model (llava)"
        )
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(config.get_text_config().vocab_size)
    plain = every[~torch.isin(every, torch.tensor(adapter.image_tokens))]
    text = plain[torch.randint(len(plain), (batch, text_tokens), generator=generator)]
    pictures = torch.full((batch, sum(adapter.images(images)[0])), adapter.image_tokens[0])
    head = text_tokens // 2
    ids = torch.cat([text[:, :head], pictures, text[:, head:]], 1).to(device)
    vision = config.vision_config
    shape = (batch * images, vision.num_channels, vision.image_size, vision.image_size)
    pixels = torch.randn(shape, generator=generator).to(device, model.dtype)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return Prompt(inputs, head, text_tokens - head)


class FirstToken(StoppingCriteria):
    """Never stops; notes when the first token is there."""

    def __init__(self, now: Callable[[], Any]) -> None:
        self.now, self.at = now, None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.at is None:
            self.at = self.now()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class Runner:
    """Runs one model on one prompt."""

    def __init__(self, adapter: Adapter, prompt: Prompt) -> None:
        self.adapter, self.prompt = adapter, prompt
        self.model: Any = adapter.model
        self.cuda = self.model.device.type == "cuda"

    @property
    def shape(self) -> str:
        ids, pixels = self.prompt.inputs["input_ids"], self.prompt.inputs["pixel_values"]
        return f"ids {list(ids.shape)}, pixel_values {list(pixels.shape)}"

    def prepare(self, pipeline: Pipeline | None) -> Subject:
        """One prefill to learn what is kept, and what enters the language model."""
        seen: dict[str, Any] = {}
        handle = Handle()

        def look(module: Any, args: tuple, kwargs: dict) -> None:
            seen.update({} if seen else kwargs)

        with wrapped(self.model, pipeline or Pipeline("dense", "original", ())):
            handle.before(self.adapter.lm, look)  # Behind vtoken's own hook, so it sees the short sequence.
            try:
                self.model.generate(**self.prompt.inputs, max_new_tokens=1)
            finally:
                handle.release()
            found = trace(self.model)
        tokens, stages = sum(found.layers[-1]), pipeline.stages if pipeline else ()
        inside = [f"{stage.name} acts at site {stage.site}" for stage in stages if stage.site != "tokens"]
        reason = f"no short prompt is equivalent: {', '.join(inside)}" if inside else None
        oracle = None if pipeline is None or inside else self._shorten(seen)
        return Subject(pipeline, tokens, found.cache_bytes, oracle, reason)

    def _shorten(self, seen: dict[str, Any]) -> Oracle:
        """The prompt that would have given the language model what it saw."""
        x, mask, full = seen["inputs_embeds"].clone(), seen.get("attention_mask"), self.prompt.inputs["input_ids"]
        mask = torch.ones(x.shape[:2], dtype=torch.long, device=x.device) if mask is None else mask.long()
        head, tail, placeholder = self.prompt.head, self.prompt.tail, self.adapter.image_tokens[0]
        # The last id is text: what pads the rows on the left must not be taken for a picture.
        ids = full[:, -1:].repeat(1, x.shape[1])
        ids[:, -tail:] = full[:, -tail:]
        for line, real in enumerate(mask.sum(1).tolist()):
            ids[line, x.shape[1] - real : -tail] = placeholder
            ids[line, x.shape[1] - real :][:head] = full[line, :head]
        visual = ids == placeholder
        return Oracle(ids, visual, x[visual], mask, seen["position_ids"].clone())

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
        handle, first = Handle(), FirstToken(self._now)
        handle.before(self.adapter.tower, lambda *_: began.append(self._now()))
        try:
            with wrapped(self.model, pipeline) if pipeline else nullcontext():
                # Wrapping scans packages and leaves caches cold, which no second call on a wrapped model finds.
                self._call(oracle, max_new_tokens=1)
                began.clear()
                handle.after(self.adapter.projector, lambda *_: ended.append(self._now()))
                resident = self._settle()
                start = self._now()
                ids = self._call(oracle, stopping_criteria=StoppingCriteriaList([first]))
                end = self._now()
                self._settle(reset=False)
                peak = torch.cuda.max_memory_allocated(self.model.device) - resident if self.cuda else None
                decisions = sum(stage.milliseconds for stage in trace(self.model).stages) if pipeline else None
        finally:
            handle.release()
        steps = self.model.generation_config.max_new_tokens - 1
        timed = Sample(
            vision=sum(self._between(*pair) for pair in zip(began, ended, strict=True)),
            stages=decisions,
            ttft=self._between(start, first.at),
            decode=self._between(first.at, end) / steps if steps else None,
            end_to_end=self._between(start, end),
            peak_bytes=peak,
        )
        return timed, ids

    def _call(self, oracle: Oracle | None, **options: Any) -> Tensor:
        model = self.model
        if oracle is None:
            return model.generate(**self.prompt.inputs, **options)
        features = model.get_image_features(pixel_values=self.prompt.inputs["pixel_values"])
        embeds = model.get_input_embeddings()(oracle.ids).masked_scatter(oracle.visual[..., None], oracle.values)
        given = {"inputs_embeds": embeds, "attention_mask": oracle.mask, "position_ids": oracle.positions}
        ids = model.generate(**given, **options)
        del features  # Held till here as `generate` holds them: memory that is in use is part of the price.
        return ids

    def _settle(self, reset: bool = True) -> int:
        """Waits for the device; returns the bytes allocated there."""
        if not self.cuda:
            return 0
        torch.cuda.synchronize(self.model.device)
        if reset:
            torch.cuda.reset_peak_memory_stats(self.model.device)
        return torch.cuda.memory_allocated(self.model.device)

    def _now(self) -> Any:
        """A moment on the clock of the device, without waiting for it."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    def _between(self, start: Any, end: Any) -> float:
        """Milliseconds; on a GPU the device has to be past both."""
        return start.elapsed_time(end) if self.cuda else 1e3 * (end - start)
