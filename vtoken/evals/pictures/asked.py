"""Questions about pictures: the inputs of a model, and its answers dense and pruned with what was kept."""

from __future__ import annotations

import time
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from vtoken.config import load
from vtoken.errors import ConfigError, VtokenError
from vtoken.evals.pictures.traced import picture
from vtoken.evals.processors import apply, check_video
from vtoken.evals.shared.dense import DENSE
from vtoken.evals.shared.media import Media, read, rgb
from vtoken.evals.shared.options import FRAMES
from vtoken.hooks.state.run import pixels_of
from vtoken.registry import catalogue
from vtoken.session import trace, watched, wrapped

# Frames are of videos; sparse attention and choices while decoding leave all tokens.
SITES = ("pixels", "encoder", "tokens", "decoder", "cache")
MEASURES = ("tokens at entry", "mean over layers", "KV cache, kB", "seconds")


def prepare(processor: Any, media: Media, question: str, model: Any) -> Any:
    """Model inputs of one prompt, on the model's device and in its dtype."""
    kind = "video" if media.video else "image"
    if media.video:
        check_video(processor)
        given = {"videos": [list(media.pictures)], "do_sample_frames": False}  # The frames were chosen already.
    else:
        given = {"images": [list(media.pictures)]}  # Nested: OneVision must know that they are of one prompt.
    if getattr(processor, "chat_template", None):
        message = {"role": "user", "content": [{"type": kind}] * media.items + [{"type": "text", "text": question}]}
        text = processor.apply_chat_template([message], add_generation_prompt=True, tokenize=False)
    else:
        text = f"{getattr(processor, f'{kind}_token', f'<{kind}>') * media.items}\n{question}"
    return apply(processor, "this", model, text=text, **given)


class Answer(NamedTuple):
    """A picture of the kept tokens, both answers, rows of MEASURES dense and pruned, and which stages stood aside."""

    picture: Any
    dense: str
    pruned: str
    rows: list[list[str]]
    aside: str


class Answerer:
    """A model, dense and pruned by a pipeline, one question at a time: the pipeline changes between calls."""

    def __init__(self, model: Any, processor: Any, new_tokens: int, frames: int = FRAMES) -> None:
        self.model, self.processor, self.new_tokens, self.frames = model, processor, new_tokens, frames
        self._turn = Lock()

    def methods(self) -> list[str]:
        """Stages with a budget and no other option without default that can be wrapped around the model."""
        found = []
        for name, cls in catalogue()[0].items():
            required = {key for key, field in cls.model_fields.items() if field.is_required()}
            if cls.site not in SITES or "keep" not in cls.model_fields or not required <= {"keep"}:
                continue
            try:
                with wrapped(self.model, load(f"{name}:64")):
                    found.append(name)
            except VtokenError:
                continue
        return found

    def __call__(self, photo: Any, video: Any, question: str, method: str, budget: str) -> Answer:
        """Asks twice, about an opened picture or the file of a video.

        Raises:
            VtokenError: a budget that does not read, not one picture or video, or what the model or the stage refuses.
        """
        if (photo is None) == (video is None):
            raise ConfigError("choose a picture first" if video is None else "choose a picture or a video, not both")
        pipeline = load(f"{method}:{budget.strip()}")
        media = Media((rgb(photo),)) if video is None else read([Path(video)], self.frames)
        with self._turn, torch.inference_mode():
            inputs = prepare(self.processor, media, question, self.model)
            dense, plain, first = self._ask(DENSE, inputs)
            pruned, seen, second = self._ask(pipeline, inputs)
        kept, total = sum(seen.tokens_out), sum(seen.visual_tokens)
        caption = f"{pipeline.name}: {kept} of {total} visual tokens"
        drawn = picture(self.processor, pixels_of("image", inputs), media, seen, caption)
        columns = MEASURES, _figures(plain, first), _figures(seen, second)
        rows = [list(row) for row in zip(*columns, strict=True)]
        return Answer(
            drawn, dense, pruned, rows, "; ".join(f"{name} stood aside: {why}" for name, why in seen.aside.items())
        )

    def _ask(self, pipeline: Any, inputs: Any) -> tuple[str, Any, float]:
        """The answer, what happened, and seconds."""
        with watched(self.model, pipeline):
            start = time.perf_counter()
            out = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.new_tokens)
            seconds = time.perf_counter() - start
            seen = trace(self.model)
        (text,) = self.processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text.strip(), seen, seconds


def _figures(seen: Any, seconds: float) -> list[str]:
    """MEASURES of a prefill."""
    return [f"{sum(seen.layers[0])}", f"{seen.average_tokens:.0f}", f"{seen.cache_bytes / 1e3:.0f}", f"{seconds:.3f}"]
