"""A vLLM engine in this process whose pipeline is swapped between tests, and what transformers with vtoken says to the
same prompts. Starting an engine takes most of a minute, so a family has one."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Read when vLLM is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

import vtoken
from vtoken import config
from vtoken.evals import reference

TOKENS = 8


@dataclass(frozen=True)
class Prompt:
    """Text with a placeholder for every picture and video; videos are [frames, height, width, 3]."""

    text: str
    pictures: Sequence[Image.Image] = ()
    videos: Sequence[Any] = ()

    @property
    def media(self) -> dict[str, list[Any]]:
        """As vLLM takes it."""
        given = {"image": list(self.pictures), "video": list(self.videos)}
        return {kind: media for kind, media in given.items() if media}


@dataclass(frozen=True)
class Said:
    """Greedy ids of every prompt, and the kept tokens of every picture that was encoded, in that order."""

    ids: list[list[int]]
    kept: list[list[int]]
    prompt_tokens: list[int]
    cached: int = 0


def questions(name: str, limit: int, size: tuple[tuple[int, int], ...] = ()) -> list[Prompt]:
    """Of the held-out set; `size`: pictures are brought to these (width, height) in turn."""
    processor, out = reference.processor(reference.path(name)), []
    for i, q in enumerate(reference.questions(limit)):
        picture = Image.open(q.image).convert("RGB")
        out.append(Prompt(reference.prompt(processor, q), [picture.resize(size[i % len(size)]) if size else picture]))
    return out


def several(name: str, limit: int) -> list[Prompt]:
    """Prompts with one, two and three pictures in turn."""
    processor, asked, out = reference.processor(reference.path(name)), reference.questions(96), []
    for i in range(limit):
        chosen = [asked[(7 * i + 13 * k) % len(asked)] for k in range(1 + i % 3)]
        content = [{"type": "image"}] * len(chosen) + [{"type": "text", "text": chosen[0].question}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        out.append(Prompt(text, [Image.open(q.image).convert("RGB") for q in chosen]))
    return out


class Transformers:
    """Answers of the stock model in a folder, wrapped.

    Args:
        processor: None: the one that resizes with Pillow.
    """

    def __init__(self, folder: str | Path, processor: Any = None) -> None:
        loaded = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
        self.model, self.processor = loaded.eval(), processor or reference.processor(Path(folder))

    def __call__(self, pipeline: Any, prompts: Sequence[Prompt]) -> Said:
        said = Said([], [], [])
        with nullcontext() if pipeline is None else vtoken.wrapped(self.model, pipeline):
            cuts = pipeline is not None and config.load(pipeline).anyres != "model"
            if cuts:
                vtoken.match_processor(self.processor, self.model)
            for prompt in prompts:
                self._answer(prompt, said, pipeline is not None)
            if cuts:
                vtoken.unmatch_processor(self.processor)
        return said

    def _answer(self, prompt: Prompt, said: Said, traced: bool) -> None:
        media = {f"{kind}s": given for kind, given in prompt.media.items()}
        inputs = self.processor(text=[prompt.text], return_tensors="pt", **media)
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        said.ids.append(out[0, length:].tolist())
        if not traced:
            said.prompt_tokens.append(length)
            return
        trace = vtoken.trace(self.model)
        said.prompt_tokens.append(trace.prompt_tokens[0])
        said.kept.extend(places.tolist() for places in trace.stages[-1].kept)


class Engine:
    """vLLM. The pipeline that it starts with is of no matter: `swap` takes another, which a user would not do."""

    def __init__(self, folder: str | Path, pipeline: Any, **options: Any) -> None:
        from vllm import LLM

        given = {
            "dtype": "float32",
            "enforce_eager": True,
            "max_model_len": 1024,
            "block_size": 32,
            "limit_mm_per_prompt": {"image": 3},
            "hf_overrides": {"vtoken": pipeline},
        }
        self.llm = LLM(str(folder), **{**given, **options})
        self.config = self.llm.llm_engine.model_config.hf_config
        (self.model,) = self.llm.apply_model(lambda model: model)

    def swap(self, pipeline: Any, *, forget: bool = True) -> None:
        from vtoken.serving import plan

        self.config.vtoken = pipeline
        self.model.install(plan.pipeline_of(self.config))
        if forget:
            self.forget()

    def forget(self) -> None:
        """Everything cached."""
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def __call__(self, prompts: Sequence[Prompt], *, alone: bool = False) -> Said:
        """Answers, all prompts at once or one after the other."""
        from vllm import SamplingParams

        greedy = SamplingParams(temperature=0, max_tokens=TOKENS)
        requests = [{"prompt": p.text, "multi_modal_data": p.media} for p in prompts]
        with recorded() as kept:
            batches = [[request] for request in requests] if alone else [requests]
            done = [out for batch in batches for out in self.llm.generate(batch, greedy, use_tqdm=False)]
        return Said(
            [list(out.outputs[0].token_ids) for out in done],
            kept,
            [len(out.prompt_token_ids) for out in done],
            sum(out.num_cached_tokens or 0 for out in done),
        )


@contextmanager
def recorded() -> Iterator[list[list[int]]]:
    """Kept tokens of every picture that is pruned meanwhile."""
    import importlib

    from vtoken.serving import decide as room

    kept: list[list[int]] = []

    def decide(*args: Any, **kwargs: Any) -> Any:
        x, history = original(*args, **kwargs)
        kept.extend(places.tolist() for places in history.kept())
        return x, history

    original = room.decide
    users = [importlib.import_module(f"vtoken.serving.{name}") for name in USERS]
    for user in users:
        user.decide = decide
    try:
        yield kept
    finally:
        for user in users:
            user.decide = original


USERS = ("_llava",)  # modules that decide
