"""Random inputs of every family, without a processor: ids, placeholders, pixels and what describes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vtoken.adapters.base import Adapter
from vtoken.errors import ConfigError
from vtoken.evals.cost.geometry import ImageSize, geometry, random_inputs
from vtoken.evals.processors import apply, check_video
from vtoken.evals.shared.media import Media
from vtoken.hooks.state.run import KINDS


@dataclass(frozen=True)
class Prompt:
    """Random text around pictures; every row alike, nothing padded.

    Attributes:
        inputs: arguments of `generate`, as the family's processor returns them.
        kind: "image" or "video".
        newlines: newline tokens of an image.
    """

    inputs: dict[str, Tensor]
    kind: str
    newlines: int


def random_prompt(
    adapter: Adapter,
    *,
    batch: int = 1,
    images: int = 1,
    frames: int = 1,
    image_size: ImageSize | None = None,
    text_tokens: int = 32,
    seed: int = 0,
    pictures: dict[str, Tensor] | None = None,
) -> Prompt:
    """Prompts of text_tokens random ids and `images` random pictures, or videos where `frames` is above 1.

    Args:
        image_size: as `geometry` takes it; pixels have the size that the family's processor would give them.
        pictures: those of all prompts, from `prepared`, in place of random ones.
    """
    model: Any = adapter.model
    config = model.config
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    inputs = pictures or random_inputs(config, batch, images, frames, image_size, draw)
    kind = "video" if "pixel_values_videos" in inputs else "image"
    shape = geometry(config, image_size, images, frames)
    # All pictures are alike. Where the prompt tells which crops make up a picture, the adapter, without a prompt, takes
    # each crop for a picture.
    marked, pictured = shape.parted_crops, adapter.layouts(kind, inputs)
    length, tokens = (sum(getattr(i, name) for i in pictured) // (batch * images) for name in ("length", "tokens"))
    many = len(pictured) // (batch * images) if marked else shape.runs
    runs = tuple(i.length for i in pictured[:many]) if marked else (length // many,) * many
    by_rows = adapter.encoder.by_rows  # a token of its own stands between two rows of a picture, another ends it
    parted = adapter.mrope or adapter.prompted or by_rows
    texts = _texts(text_tokens, _between(images, many, parted, marked), ends=int(marked or by_rows))
    placeholder = adapter.placeholders[kind]
    every = torch.arange(config.get_text_config().vocab_size)
    marks = [*adapter.placeholders.values(), *adapter.embedded.values()]
    mark, end, *plain = every[~torch.isin(every, torch.tensor(marks))].tolist()
    words = torch.tensor(plain)[torch.randint(len(plain), (batch, text_tokens), generator=generator)]
    text = words.split(texts, 1)
    if marked:
        _mark(text, many, mark)
    shown = [torch.full((batch, n), placeholder) for n in runs]
    if by_rows:
        if pictured[0].newline is not None:
            shown[0][:, pictured[0].newline] = mark
        for after in text[1:]:
            after[:, 0] = end
    ids = torch.cat([text[0], *(each for pair in zip(shown * images, text[1:], strict=True) for each in pair)], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if adapter.mrope:
        found["mm_token_type_ids"] = (ids == placeholder) * (1 + KINDS.index(kind))
    for name, value in inputs.items():
        found[name] = value.to(model.dtype) if name.startswith("pixel_values") else value
    moved = {name: value.to(model.device) for name, value in found.items()}
    return Prompt(moved, kind, length - tokens)


def prepared(media: Media, processor: Any, batch: int, images: int) -> dict[str, Tensor]:
    """Pixels of `batch` prompts that show the same picture or video so many times.

    Raises:
        UnsupportedError: model or processor do not take it.
    """
    shown = list(media.pictures)
    if not media.video:
        # What the processor gives its image processor.
        more = {**getattr(processor, "images_kwargs", {})}
        more.pop("return_tensors", None)
        found = dict(apply(processor.image_processor, "this picture", images=[shown * images] * batch, **more))
        for name in ("num_patches", "num_crops", "rows", "cols"):  # Models do not take these.
            found.pop(name, None)
        return found
    check_video(processor)
    videos = [shown] * (batch * images)
    return dict(apply(processor.video_processor, "this video", videos=videos, do_sample_frames=False))


def _between(images: int, runs: int, parted: bool, marked: bool) -> list[int]:
    """Text tokens that must stand between neighbouring runs of placeholders; every image has `runs` of them."""
    return [int(parted) + int(marked and place % runs == 0) for place in range(1, images * runs)]


def _texts(tokens: int, between: list[int], ends: int) -> tuple[int, ...]:
    """Text tokens before, between and after the runs. Those not needed between them stand half before and half after
    all runs, at least `ends` on each side."""
    inner = sum(between)
    least = inner + max(1, 2 * ends)
    if tokens < least:
        raise ConfigError(
            f"text_tokens must be at least {least}, not {tokens}: a text token parts each two of the "
            f"{len(between) + 1} images, crops or frames"
        )
    head = (tokens - inner) // 2
    return (head, *between, tokens - inner - head)


def _mark(text: Sequence[Tensor], runs: int, mark: int) -> None:
    """Puts a mark in front of every run of placeholders, and one after each image, which is so many runs."""
    for before in text[:-1]:
        before[:, -1] = mark
    for behind in text[runs::runs]:
        behind[:, 0] = mark
