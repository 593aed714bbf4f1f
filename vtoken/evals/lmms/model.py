"""The model that lmms-eval sees: `lmms-eval --model vtoken --model_args pretrained=NAME,pipeline=flowcut-64 --tasks
pope`."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from statistics import fmean
from typing import Any, NoReturn

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.models.model_utils.gen_metrics import log_metrics

import vtoken
from vtoken import config
from vtoken.config import Pipeline
from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals.lmms.generation import TextGenerator
from vtoken.evals.lmms.prompts import LMMS_EVAL_PIXELS, Prompt, from_chat, limit_pixels, pixels
from vtoken.evals.lmms.records import Request
from vtoken.evals.lmms.response_cache import identify
from vtoken.evals.shared import models
from vtoken.evals.shared.bars import progress
from vtoken.evals.shared.dense import is_stock
from vtoken.evals.shared.identity import code, named_files, weights


class VtokenModel(lmms):
    """Any supported Hugging Face VLM with a pipeline on it, or none.

    An exception in model, processor or stage ends the run: it is never scored as an empty answer.

    `--use_cache` knows a model by its weights, by what its pipeline says, files named in it included, and by vtoken's
    version and code: what was edited is asked anew.

    Args:
        pretrained: shipped model, folder or hub name.
        pipeline: preset, `method:budget` or YAML file; "none" is the stock model, not wrapped. lmms-eval parts
            arguments at commas: stages with further options must be a file here.
        positions, newline, anyres, min_visual_tokens: policies in place of the pipeline's own.
        device, dtype, attn_implementation, revision: of the model; None is its own. Under torchrun every process takes
            a GPU.
        batch_size: prompts at a time, left-padded.
        min_pixels, max_pixels: of a picture, Qwen families; None is the processor's own.
        lmms_eval_pixels: those that lmms-eval's Qwen classes set, in place of both.
        frames: most frames of a video.
        system_prompt: text, or a file that holds it.
        max_new_tokens: in place of what the tasks say.
        records: JSONL file that is given one line per answer.

    Attributes:
        requests: what was answered since the pipeline was put on.

    Raises:
        ConfigError, UnsupportedError: an argument that cannot be used; before anything is loaded, where that is known.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        pipeline: Any = "none",
        device: str | None = None,
        dtype: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        lmms_eval_pixels: bool = False,
        frames: int = 8,
        system_prompt: str | None = None,
        max_new_tokens: int | None = None,
        records: str | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        policies = {key: unknown.pop(key) for key in config.POLICY_KEYS if key in unknown}
        if unknown:
            raise ConfigError(f"unknown model_args: {', '.join(sorted(unknown))}")
        try:
            self.batch_size_per_gpu = int(batch_size)
        except ValueError:
            raise ConfigError(f"batch_size must be a whole number, not {batch_size!r}") from None
        if min(self.batch_size_per_gpu, frames) < 1:
            raise ConfigError("batch_size and frames must be at least 1")
        if lmms_eval_pixels and (min_pixels, max_pixels) != (None, None):
            raise ConfigError("lmms_eval_pixels sets min_pixels and max_pixels; give one or the others")
        if lmms_eval_pixels:
            min_pixels, max_pixels = LMMS_EVAL_PIXELS
        parsed = config.load(pipeline)
        if policies:
            name = ",".join([parsed.name, *(f"{key}={value}" for key, value in policies.items())])
            own = {key: getattr(parsed, key) for key in config.POLICY_KEYS}
            whole = config.load({**own, **policies, "stages": parsed.stages})
            parsed = replace(whole, name=name, written=f'pipeline "{name}"')
        if device is None and "LOCAL_RANK" in os.environ and models.to_device(None).type == "cuda":
            device = f"cuda:{os.environ['LOCAL_RANK']}"
        model, processor = models.load_pair(
            pretrained, device, dtype, revision, attn_implementation=attn_implementation
        )
        limit_pixels(processor, min_pixels, max_pixels)
        self.pretrained, self.revision, self.frames = pretrained, revision, frames
        self.system_prompt = self._resolve_system_prompt(system_prompt) if system_prompt else None
        self.records = None if records is None else os.path.abspath(records)
        self.requests: list[Request] = []
        self._sources: dict[tuple[str, int], tuple[Any, str]] = {}
        # A torch module in an attribute of its own would be deleted after a run: see `clean`.
        self.generator = TextGenerator(model, processor, max_new_tokens)
        self.use(parsed)

    @property
    def device(self) -> Any:
        return self.generator.model.device

    @property
    def batch_size(self) -> int:
        return self.batch_size_per_gpu

    def use(self, pipeline: Pipeline) -> None:
        """Puts another pipeline on the same weights; one without stages leaves the stock model, with no hook on it."""
        self.generator.use(None if is_stock(pipeline) else pipeline)
        self.requests = []

    def about(self) -> dict[str, Any]:
        """Everything that decides answers, weights aside."""
        pipeline = self.generator.pipeline
        return {
            "pretrained": self.pretrained,
            "revision": self.revision,
            "pipeline": None if pipeline is None else config.dump(pipeline),
            "dtype": str(self.generator.model.dtype).removeprefix("torch."),
            "attention": self.generator.model.config._attn_implementation,
            "pixels": pixels(self.generator.processor),
            "frames": self.frames,
            "system_prompt": self.system_prompt,
            "max_new_tokens": self.generator.max_new_tokens,
            "batch_size": self.batch_size_per_gpu,
        }

    def __repr__(self) -> str:
        # lmms-eval's response cache takes it for the model's identity.
        about = {
            **self.about(),
            "files": [] if self.generator.pipeline is None else named_files(self.generator.pipeline),
            "weights": self._weights,
            "vtoken": [vtoken.__version__, code()],
        }
        return f"VtokenModel({json.dumps(about, sort_keys=True, default=str)})"

    @cached_property
    def _weights(self) -> str | None:
        return getattr(self.generator.model.config, "_commit_hash", None) or weights(self.pretrained, self.revision)

    def clean(self) -> None:
        """Keeps the weights: lmms-eval calls this after every run, to free what the next run of a sweep needs again."""

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers in the order of the requests, which are batched with others of the same generation options.

        Raises:
            Whatever the model raises, with the documents of the batch in a note.
        """
        groups: dict[str, list[int]] = {}
        for k, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[2], sort_keys=True, default=str), []).append(k)
        size = self.batch_size_per_gpu
        batches = [group[k : k + size] for group in groups.values() for k in range(0, len(group), size)]
        found: dict[int, Request] = {}
        seen: dict[tuple[str, int], int] = {}
        with progress(shown=self.rank == 0) as tell:
            for done, batch in enumerate(batches):
                tell(f"{self._label()}: {done} of {len(batches)}", done / len(batches))
                found |= self._batch(batch, [requests[k] for k in batch], seen)
        real = [k for k in range(len(requests)) if not requests[k].metadata.get("__padding_only__")]
        self._note([found[k] for k in real])
        replies = [found[k].reply for k in range(len(requests))]
        return [GenerationResult(r.text, TokenCounts(r.cost.input_tokens, r.cost.new_tokens)) for r in replies]

    def _batch(
        self, places: Sequence[int], batch: Sequence[Any], seen: dict[tuple[str, int], int]
    ) -> dict[int, Request]:
        about = [(task, doc, split) for _, _, _, doc, task, split in (request.args for request in batch)]
        try:
            prompts = [
                # Looked up per request: a batch may mix tasks.
                self._prompt(request.args[1], task, split, doc)
                for request, (task, doc, split) in zip(batch, about, strict=True)
            ]
            replies = self.generator.generate(prompts, batch[0].args[2])
        except Exception as error:
            where = ", ".join(f"{task} {doc}" for task, doc, _ in about)
            error.add_note(f"while {self._label()} answered {where}")
            raise
        found = {}
        for place, request, prompt, (task, doc, split), reply in zip(
            places, batch, prompts, about, replies, strict=True
        ):
            self._sources[task, int(doc)] = request.args[1], split
            repeat = seen.get((task, doc), 0)
            seen[task, doc] = repeat + 1
            found[place] = Request(task, int(doc), repeat, reply, prompt.fingerprint)
        return found

    def prompt(self, task: str, doc: int) -> Prompt:
        """What the model was shown when it answered a document.

        Raises:
            KeyError: a document that it did not answer.
        """
        messages, split = self._sources[task, doc]
        return self._prompt(messages, task, split, doc)

    def introduce(self, task: str, documents: Any, messages: Any, split: str, docs: Sequence[int]) -> None:
        """Makes `prompt` work for documents that another process answered, or an earlier run.

        Args:
            documents: the task's, by split; `messages` makes the chat of one.
            docs: numbers of those meant.
        """
        self.task_dict[task] = documents
        self._sources |= {(task, doc): (messages, split) for doc in docs}

    def _prompt(self, messages: Any, task: str, split: str, doc: int) -> Prompt:
        return from_chat(messages(self.task_dict[task][split][doc]), self.frames, self.system_prompt)

    def _note(self, answered: Sequence[Request]) -> None:
        """Keeps the requests, writes them down, and tells lmms-eval what they cost on average."""
        self.requests += answered
        if self.records is not None:
            with open(self.records, "a", encoding="utf-8") as file:
                file.writelines(json.dumps({"pipeline": self._label(), **r.to_dict()}) + "\n" for r in answered)
        if not answered:
            return
        costs = [request.reply.cost for request in answered]
        seconds = sum((cost.ttft_s + cost.decode_s) / cost.batch for cost in costs)
        tokens = sum(cost.new_tokens for cost in costs)
        names = ("ttft_s", "visual_tokens", "visual_tokens_entry", "visual_tokens_mean")
        means = {name: fmean(getattr(cost, name) for cost in costs) for name in names}
        log_metrics(seconds, tokens, tokens / seconds, {"num_requests": len(costs), **means})

    def _label(self) -> str:
        return "dense" if self.generator.pipeline is None else self.generator.pipeline.name

    def loglikelihood(self, requests: list[Any]) -> NoReturn:
        """Raises UnsupportedError: a wrapped model generates."""
        raise UnsupportedError(
            "tasks scored by likelihood (multiple_choice, *_mcppl) are not served; take the task's generating variant"
        )

    def generate_until_multi_round(self, requests: list[Any]) -> NoReturn:
        """Raises UnsupportedError: one question, one answer."""
        raise UnsupportedError("tasks of several rounds are not served; leave them out")


identify(VtokenModel)
