"""One vLLM engine in this process, whose pipeline is swapped, and the same prompts in transformers with `vtoken.wrap`."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}

import numpy as np
import torch
from vllm import LLM, SamplingParams

import vtoken
from vtoken.serving import _qwen, plan
from vtoken.serving._qwen_prompt import SWITCH

NEW = 8
CHUNK = 24  # tokens of a step: pictures are cut
FRAMES = 8
META = {"fps": 2.0, "duration": FRAMES / 2, "total_num_frames": FRAMES, "frames_indices": [*range(FRAMES)]}


@dataclass
class Asked:
    """A prompt with its pictures, and, where there is one, a video [FRAMES, height, width, 3]."""

    text: str
    pictures: list[Any] = field(default_factory=list)
    video: np.ndarray | None = None


@dataclass
class Told:
    """What a prompt led to: answer ids, tokens of the prompt, kept tokens of every picture and video."""

    ids: list[int]
    prompt: int
    kept: list[list[int]]


class Served:
    """An engine.

    Args:
        metadata: whether this family's processor asks for a video's.
    """

    def __init__(self, folder: Path, first: Any, metadata: bool = True, **options: Any) -> None:
        given = {"limit_mm_per_prompt": {"image": 3, "video": 1}, "max_num_seqs": 4, "block_size": 32} | options
        self.llm = LLM(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=CHUNK,
            hf_overrides={"vtoken": first},
            **given,
        )
        self.metadata, engine = metadata, self.llm.llm_engine
        self.config = engine.model_config.hf_config
        (self.model,) = self.llm.apply_model(lambda model: model)
        self.runner = engine.model_executor.driver_worker.worker.model_runner

    def swap(self, pipeline: Any, asks: bool = False) -> None:
        """Serves another pipeline. `asks`: the runner asks for recomputed positions, as those on GPUs do."""
        self.config.vtoken, on = pipeline, pipeline is not None
        self.model.install(plan.pipeline_of(self.config))
        self.runner.is_multimodal_pruning_enabled = on and asks
        # In one process the model's switch is the front end's, too.
        self.model.multimodal_config.video_pruning_rate = SWITCH if on else None
        self.model.is_multimodal_pruning_enabled = on
        self.forget()

    def forget(self) -> None:
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()

    def requests(self, prompts: Sequence[Asked]) -> list[dict[str, Any]]:
        out = []
        for asked in prompts:
            data: dict[str, Any] = {"image": asked.pictures} if asked.pictures else {}
            if asked.video is not None:
                more = {**META, "video_backend": "opencv", "do_sample_frames": False}
                data["video"] = (asked.video, more) if self.metadata else asked.video
            out.append({"prompt": asked.text, "multi_modal_data": data})
        return out

    def generate(self, prompts: Sequence[Asked], new: int = NEW) -> list[Any]:
        greedy = SamplingParams(temperature=0, max_tokens=new, ignore_eos=False)
        return self.llm.generate(self.requests(prompts), greedy, use_tqdm=False)

    def ids(self, prompts: Sequence[Asked]) -> list[list[int]]:
        return [list(done.outputs[0].token_ids) for done in self.generate(prompts)]

    def told(self, asked: Asked) -> Told:
        """One prompt alone, nothing of it cached."""
        self.forget()
        with recorded_choices() as kept:
            (done,) = self.generate([asked])
        return Told(list(done.outputs[0].token_ids), len(done.prompt_token_ids), kept)

    def positions(self, asked: Asked) -> torch.Tensor:
        """[3, L] that the decoder is given for a prompt, chunk by chunk."""
        self.forget()
        seen, stock = [], type(self.model).__mro__[2]
        original = stock.forward

        def forward(model: Any, ids: Any, positions: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            seen.append(positions.clone())
            return original(model, ids, positions, *args, **kwargs)

        stock.forward = forward
        try:
            (done,) = self.generate([asked], new=1)
        finally:
            stock.forward = original
        return torch.cat(seen, 1)[:, : len(done.prompt_token_ids)]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm, self.model, self.runner
        cleanup_dist_env_and_memory()


@contextmanager
def recorded_choices() -> Iterator[list[list[int]]]:
    """Kept tokens of every picture and video that the model decides about meanwhile."""
    kept: list[list[int]] = []
    original = _qwen.decide

    def decide(*args: Any, **kwargs: Any) -> Any:
        x, history = original(*args, **kwargs)
        kept.extend(index.tolist() for index in history.kept())
        return x, history

    _qwen.decide = decide
    try:
        yield kept
    finally:
        _qwen.decide = original


class Wrapped:
    """The same checkpoint in transformers."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
        self.processor = AutoProcessor.from_pretrained(folder)

    def prompt(self, *content: str) -> str:
        """A message of "image", "video" and texts, ready for an answer."""
        parts = [{"type": part} if part in ("image", "video") else {"type": "text", "text": part} for part in content]
        message = [{"role": "user", "content": parts}]
        text: str = self.processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        return text

    def inputs(self, asked: Asked) -> Any:
        from transformers.video_utils import VideoMetadata

        given: dict[str, Any] = {"images": asked.pictures} if asked.pictures else {}
        if asked.video is not None:
            given |= {"videos": [asked.video], "video_metadata": [VideoMetadata(**META)], "do_sample_frames": False}
        return self.processor(text=[asked.text], return_tensors="pt", **given)

    def positions(self, asked: Asked) -> torch.Tensor:
        """[3, L] of the whole prompt."""
        inputs = self.inputs(asked)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw", "second_per_grid_ts")
        given = {name: inputs[name] for name in names if name in inputs}
        return self.model.model.get_rope_index(**given)[0][:, 0]

    def media(self, asked: Asked) -> torch.Tensor:
        """[N] columns of the placeholders in the whole prompt."""
        config, ids = self.model.config, self.inputs(asked)["input_ids"][0]
        return ((ids == config.image_token_id) | (ids == config.video_token_id)).nonzero()[:, 0]

    def columns(self, asked: Asked, kept: Sequence[list[int]]) -> torch.Tensor:
        """[K] columns of the whole prompt that are left, where these tokens are kept of every picture, and of a video
        behind them."""
        inputs, media = self.inputs(asked), self.media(asked)
        grids = [grid for name in ("image_grid_thw", "video_grid_thw") for grid in inputs.get(name, [])]
        stays = torch.ones(inputs["input_ids"].shape[1], dtype=torch.bool)
        stays[media] = False
        for own, index in zip(media.split([int(grid.prod()) // 4 for grid in grids]), kept, strict=True):
            stays[own[index]] = True
        return stays.nonzero()[:, 0]

    def told(self, asked: Asked, pipeline: Any) -> Told:
        inputs = self.inputs(asked)
        if pipeline is None:
            return Told(self._answer(inputs), inputs["input_ids"].shape[1], [])
        with vtoken.wrapped(self.model, pipeline):
            ids, trace = self._answer(inputs), vtoken.trace(self.model)
        return Told(ids, trace.prompt_tokens[0], [index.tolist() for index in trace.stages[-1].kept])

    def _answer(self, inputs: Any) -> list[int]:
        with torch.inference_mode():
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=NEW)
        return out[0, inputs["input_ids"].shape[1] :].tolist()


def assert_same(served: Served, wrapped: Wrapped, prompts: Sequence[Asked], pipeline: Any) -> None:
    """Answers of all at once, and of some alone, with prompt lengths and kept tokens, as in transformers."""
    wanted = [wrapped.told(asked, pipeline) for asked in prompts]
    done = served.generate(prompts)
    assert [list(d.outputs[0].token_ids) for d in done] == [told.ids for told in wanted]
    assert [len(d.prompt_token_ids) for d in done] == [told.prompt for told in wanted]
    for asked, told in zip(prompts[::5], wanted[::5], strict=True):
        assert served.told(asked) == told


def assert_positions(served: Served, wrapped: Wrapped, asked: Asked, pipeline: Any) -> None:
    """Text and kept tokens stand where they do in the whole prompt of transformers."""
    columns = wrapped.columns(asked, wrapped.told(asked, pipeline).kept)
    assert torch.equal(served.positions(asked), wrapped.positions(asked)[:, columns])
