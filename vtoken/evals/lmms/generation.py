"""Prompts in, answers and their costs out. Knows nothing of lmms-eval."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import StoppingCriteriaList

from vtoken import registry
from vtoken.config import Pipeline
from vtoken.errors import ConfigError
from vtoken.evals.lmms.prompts import Prompt, encode
from vtoken.evals.lmms.records import Cost, Reply, dense_tokens, pruned_tokens, stage_times
from vtoken.evals.speed.timing import FirstToken
from vtoken.hooks.state.run import Clock
from vtoken.session import match_processor, trace, unwrap, wrap


class TextGenerator:
    """A stock model with its processor, dense or with a pipeline on it.

    Attributes:
        pipeline: what is on it, None for dense.
        max_new_tokens: in place of what a request asks for; None leaves it to the request.
    """

    def __init__(self, model: Any, processor: Any, max_new_tokens: int | None = None) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
        self.model, self.processor, self.max_new_tokens = model, processor, max_new_tokens
        self.adapter = registry.adapter(model.config.model_type)(model)
        self.clock = Clock(model.device)
        self.pipeline: Pipeline | None = None
        self._cold = True

    def use(self, pipeline: Pipeline | None) -> None:
        """Takes off what is on the model, then puts this on."""
        if self.pipeline is not None:
            unwrap(self.model)
            self.pipeline = None
        if pipeline is not None:
            wrap(self.model, pipeline)
            self.pipeline = pipeline
        if hasattr(self.model.config, "image_grid_pinpoints"):
            match_processor(self.processor, self.model)
        self._cold = True

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt], options: Mapping[str, Any]) -> list[Reply]:
        """Answers of one batch.

        Args:
            options: of generation, as lmms-eval's tasks give them: max_new_tokens, temperature, top_p, num_beams, until
                (texts that end an answer); others are ignored.

        Raises:
            Whatever processor and model raise: a failure is never an empty answer.
        """
        began = time.perf_counter()
        inputs = encode(self.processor, prompts, self.model)
        self.clock.wait()
        preprocess = time.perf_counter() - began
        arguments = self._arguments(options)
        if self._cold:  # What the first call sets up is not what a request costs.
            self.model.generate(**inputs, **{**arguments, "max_new_tokens": 1})
            self._cold = False
        first = FirstToken(self.clock.now)
        start = self.clock.now()
        out = self.model.generate(**inputs, **arguments, stopping_criteria=StoppingCriteriaList([first]))
        end = self.clock.now()
        ttft, decode = (self.clock.between(*pair) / 1e3 for pair in ((start, first.at), (first.at, end)))
        acted = self.pipeline is not None and self.pipeline.stages
        if not acted or not any(name.startswith("pixel_values") for name in inputs):
            tokens, stages = dense_tokens(self.adapter, inputs), {}
        else:
            beams = arguments["num_beams"]
            seen = trace(self.model)
            tokens = pruned_tokens(inputs, seen, range(0, beams * len(prompts), beams))
            stages = stage_times(seen)
        new = out[:, inputs["input_ids"].shape[1] :]
        texts = self.processor.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        shared: Any = {"batch": len(prompts), "preprocess_s": preprocess, "ttft_s": ttft, "decode_s": decode}
        shared["stages"] = stages
        costs = [
            Cost(**vars(own), new_tokens=self._length(row), **shared)
            for row, own in zip(new.tolist(), tokens, strict=True)
        ]
        return [Reply(ended(text, options.get("until")), cost) for text, cost in zip(texts, costs, strict=True)]

    def _arguments(self, options: Mapping[str, Any]) -> dict[str, Any]:
        heat = float(options.get("temperature") or 0)
        chosen: dict[str, Any] = {
            "do_sample": heat > 0,
            "num_beams": int(options.get("num_beams") or 1),
            "max_new_tokens": self.max_new_tokens or int(options.get("max_new_tokens") or 128),
            # Without these a checkpoint's own would be warned about when nothing is sampled.
            "temperature": heat or None,
            "top_p": options.get("top_p") if heat else None,
            "top_k": None,
        }
        if self.model.generation_config.pad_token_id is None:
            chosen["pad_token_id"] = self.processor.tokenizer.pad_token_id
        return chosen

    def _length(self, row: Sequence[int]) -> int:
        """Tokens of a row up to its end-of-sequence token, that included."""
        ends = self.model.generation_config.eos_token_id
        ends = {ends} if ends is None or isinstance(ends, int) else set(ends)
        return next((k + 1 for k, token in enumerate(row) if token in ends), len(row))


def ended(text: str, until: Any) -> str:
    """The text up to the first of the endings. An empty line ends nothing: lmms-eval gives it to every task, and its
    Qwen classes drop it as well."""
    for ending in [until] if isinstance(until, str) else until or []:
        if ending and ending != "\n\n":
            text = text.split(ending)[0]
    return text
