"""Scores of the frames of a video, by the VLM itself or by a model that compares pictures with text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import PrivateAttr
from torch import Tensor

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.session import session_of, watched, whole
from vtoken.stages import Compressor, Fact, Keep, Site, VisualTokens, image_of, keep_all


class _Attended(Compressor):
    """Drops nothing; sums, per frame, the attention of the last prompt token in the layer before each of `at`."""

    name: ClassVar[str] = "attended"
    site: ClassVar[Site] = "decoder"

    at: tuple[int, ...]
    _sums: list[list[Tensor]] = PrivateAttr(default_factory=list)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.at

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("last_query_attention"),)

    def select(self, tokens: VisualTokens) -> Keep:
        attention = tokens.fact("last_query_attention").double()
        image = image_of(tokens.lengths, attention.device)
        frame = torch.zeros_like(image) if tokens.segment is None else tokens.segment
        sums = []
        for i, parts in enumerate(tokens.parts):
            if len(parts) == 1 and parts[0][0] > 1:  # a video
                own = image == i
                sums.append(attention.new_zeros(parts[0][0]).index_add_(0, frame[own], attention[own]))
        self._sums.append(sums)
        return keep_all(tokens)

    def found(self) -> list[list[float]]:
        """The means over the layers, per video."""
        return [torch.stack(each).mean(0).tolist() for each in zip(*self._sums, strict=True)]


def frame_relevance(model: Any, inputs: Mapping[str, Any]) -> list[list[float]]:
    """The share of its attention that the last token of a prompt pays to each frame, for `frames_relevant`.

    Runs one dense forward. So give it many frames of few pixels (see the size options of the processor), and then let
    the model answer from the frames that stay, at full size. The score is the mean over heads and over the layers with
    attention in the middle third of the decoder. No paper: a rule of ours.

    Args:
        model: a model of a supported family that takes videos, not wrapped.
        inputs: from its processor: `input_ids` [B, L] and videos. Still pictures get no score.

    Returns:
        For each video, in the order of the prompts, one number >= 0 per frame (in Qwen models per pair of frames, which
        the tower embeds together); their sum is at most 1.

    Raises:
        UnsupportedError: the model is wrapped or of no supported family, or the inputs hold no video.
    """
    if session_of(model) is not None:
        raise UnsupportedError("frame_relevance reads a model that is not wrapped; call vtoken.unwrap(model) first")
    inner = whole(model)
    adapter = registry.adapter(inner.config.model_type)(inner)
    attending, depth = adapter.attending, len(adapter.lm.layers)
    middle = [k for k in attending if depth // 3 <= k < depth - depth // 3 and k + 1 < depth]
    stage = _Attended(at=tuple(k + 1 for k in middle or attending[:1]))
    with watched(model, [stage]), torch.no_grad():
        model(**inputs, use_cache=False, logits_to_keep=1)
    found = stage.found()
    if not found:
        raise UnsupportedError("the inputs hold no video; give the processor's output for a prompt with one")
    return found


def question_relevance(
    frames: Sequence[Any],
    question: str,
    encoder: str | tuple[Any, Any] = "google/siglip2-base-patch16-224",
    batch: int = 32,
) -> list[float]:
    """The cosine of each frame with the question, by a dual encoder of pictures and text, for `frames_relevant`.

    Args:
        frames: PIL images.
        question: without the chat around it; it is cut to the length that the text encoder takes (SigLIP 2: 64 tokens).
        encoder: folder or hub name of a SigLIP, SigLIP 2 or CLIP model; or (model, processor), to load it once.
        batch: frames that are encoded at a time.

    Returns:
        One number in -1..1 per frame.

    Raises:
        UnsupportedError: the model has no picture or no text side.
        ValueError: there are no frames.
    """
    model, processor = _loaded(frames, encoder)
    with torch.no_grad():
        # SigLIP was trained on texts that are padded to the full length.
        text = processor(text=[question], padding="max_length", truncation=True, return_tensors="pt").to(model.device)
        asked = _unit(model.get_text_features(**text))
        return [float(x) for x in _encoded(frames, model, processor, batch) @ asked[0]]


def distinct_frames(
    frames: Sequence[Any],
    keep: int,
    evenly: float = 0.85,
    encoder: str | tuple[Any, Any] = "google/siglip2-base-patch16-224",
    batch: int = 32,
) -> list[float]:
    """Chooses frames that are spread over a video and differ from each other, without a question: int(`keep` *
    `evenly`) frames evenly spaced (at least the first), then, one at a time, that of lowest mean cosine to the chosen.

    D-CoDe chooses frames like this (https://arxiv.org/abs/2510.08818): 15 of 50 with CLIP ViT-L/14 at 336 pixels, 85 %
    of them evenly spaced. Deviation: ties go to the earlier frame.

    Args:
        frames: PIL images, in order; keep: frames to choose, 1 to all.
        evenly: share of them that is evenly spaced, 0 to 1.
        encoder: as in `question_relevance`; the text side is not used.
        batch: frames that are encoded at a time.

    Returns:
        1.0 for each chosen frame, else 0.0: for `frames_relevant: {keep: KEEP, relevance: ..., rule: top}`.

    Raises:
        UnsupportedError: the model has no picture or no text side.
        ValueError: `keep` is not 1 to all frames, or `evenly` is not in 0..1.
    """
    if not 1 <= keep <= len(frames) or not 0 <= evenly <= 1:
        raise ValueError(
            f"keep: {keep} and evenly: {evenly} with {len(frames)} frames; keep 1 to all of them, evenly 0 to 1"
        )
    model, processor = _loaded(frames, encoder)
    with torch.no_grad():
        features = _encoded(frames, model, processor, batch)
    chosen = distinct((features @ features.T).cpu(), keep, evenly)
    return [float(frame in chosen) for frame in range(len(frames))]


def distinct(cosines: Tensor, keep: int, evenly: float) -> list[int]:
    """Indices of the chosen frames, ascending: the rule of `distinct_frames` on the cosines [F, F] of all frames."""
    n = len(cosines)
    chosen = {int(i) for i in torch.linspace(0, n - 1, int(keep * evenly), dtype=torch.float64)} or {0}
    while len(chosen) < keep:
        others = [frame for frame in range(n) if frame not in chosen]
        near = cosines[others][:, sorted(chosen)].mean(1)
        chosen.add(others[int(near.argmin())])
    return sorted(chosen)


def _loaded(frames: Sequence[Any], encoder: str | tuple[Any, Any]) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    if not frames:
        raise ValueError("there are no frames; give a list of PIL images")
    if isinstance(encoder, str):
        encoder = AutoModel.from_pretrained(encoder), AutoProcessor.from_pretrained(encoder)
    if not (hasattr(encoder[0], "get_image_features") and hasattr(encoder[0], "get_text_features")):
        raise UnsupportedError(
            f"{type(encoder[0]).__name__} compares no pictures with text; take a SigLIP, SigLIP 2 or CLIP checkpoint"
        )
    return encoder


def _encoded(frames: Sequence[Any], model: Any, processor: Any, batch: int) -> Tensor:
    """[F, D] fp32 features of length 1."""
    found = []
    for start in range(0, len(frames), batch):
        pixels = processor(images=list(frames[start : start + batch]), return_tensors="pt").to(model.device)
        found.append(_unit(model.get_image_features(**pixels)))
    return torch.cat(found)


def _unit(out: Any) -> Tensor:
    """Rows of length 1; transformers returns features bare or as `pooler_output`."""
    features = out if isinstance(out, Tensor) else out.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)
