"""Qwen2-VL and Qwen2.5-VL as vLLM serves them, with a pipeline after the merger; kept tokens keep their M-RoPE
positions. Pictures and videos are treated alike; `_mrope` explains how their positions are passed along."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VLDummyInputsBuilder,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLMultiModalProcessor,
    Qwen2_5_VLProcessingInfo,
)
from vllm.model_executor.models.qwen2_vl import (
    Qwen2VLDummyInputsBuilder,
    Qwen2VLForConditionalGeneration,
    Qwen2VLMultiModalProcessor,
    Qwen2VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout
from vtoken.serving import plan
from vtoken.serving._engine import check_engine, check_parallel, groups
from vtoken.serving._keyed import LOGGER, text_key
from vtoken.serving._mrope import Span, coordinates, placed, prompt_positions, with_places, without_places
from vtoken.serving._qwen_parts import QwenParts
from vtoken.serving._qwen_prompt import SWITCH, Planned
from vtoken.serving._qwen_tower import ServedTower
from vtoken.serving._tower import agreed
from vtoken.serving.decide import decide
from vtoken.stages import Fact

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class Pruned:
    """A mixin for models: prunes the output of the tower, and reports the positions of kept tokens. Stock without a
    pipeline."""

    config: Any
    visual: Any
    language_model: Any
    width: int | None = None  # channels of an embedding, if the tower returns more

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        pipeline = plan.pipeline_of(vllm_config.model_config.hf_config)
        if pipeline is not None:
            check_engine(vllm_config, pipeline)
            check_parallel(vllm_config)
            vllm_config.model_config.get_multimodal_config().video_pruning_rate = SWITCH
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.tower: ServedTower | None = None
        self.unplaced: tuple[Tensor, Tensor] | None = None
        self.most = vllm_config.scheduler_config.max_num_encoder_input_tokens
        self.install(pipeline)

    def install(self, pipeline: Pipeline | None) -> None:
        """Installs hooks in the tower for the facts that the stages need; a second call replaces the first."""
        if self.tower is not None:
            self.tower.context.handle.release()
        self.pipeline = pipeline
        self.parts = QwenParts(self.config, self.visual)
        self.tower = None
        if pipeline is not None:
            self.tower = ServedTower(self.parts, pipeline)
            LOGGER.info("vtoken: %s", pipeline.name)

    def embed_multimodal(self, **kwargs: Any) -> Any:
        if self.pipeline is None:
            return super().embed_multimodal(**kwargs)  # type: ignore[misc]
        out: list[Tensor] = []
        for kind, pixels in PIXELS.items():
            if pixels in kwargs:
                grids, texts = kwargs[f"{kind}_grid_thw"], kwargs.get(text_key(kind), ())
                steps = self._steps(kind, kwargs, len(grids))
                for patches, items in self._slices(grids):
                    out += self._encode(kind, kwargs[pixels][patches], grids[items], steps[items], texts[items])
        return tuple(out)

    def _slices(self, grids: Tensor) -> Iterator[tuple[slice, slice]]:
        """Slices of patches and of pictures, with as many pictures at a time as the dense model would be given; the
        scheduler counts only kept tokens."""
        sizes = grids.prod(-1).tolist()
        ends = [0, *accumulate(sizes)]
        for items in groups(sizes, self.most * self.parts.encoder.unit):
            yield slice(ends[items.start], ends[items.stop]), items

    def _steps(self, kind: str, given: dict[str, Any], count: int) -> list[float]:
        """Positions from one frame to the next, per picture or video."""
        if kind == "image":
            return [1.0] * count
        seconds = given.get("second_per_grid_ts")
        rate = getattr(self.config.vision_config, "tokens_per_second", 1.0)
        return [each * rate for each in ([1.0] * count if seconds is None else seconds.flatten().tolist())]

    def _encode(self, kind: str, pixels: Tensor, grids: Tensor, steps: list[float], texts: Any) -> list[Tensor]:
        """[K, D + 6] for each picture or video: its kept tokens and their places in it. `texts` are the token ids
        around each, if a stage reads them."""
        assert self.tower is not None and self.pipeline is not None
        tower, layouts = self.tower, self.parts.rasters(grids.tolist())
        process: Any = getattr(self, f"_process_{kind}_input")

        def read(need: Fact) -> Any:
            if need.name != "text":
                return tower.read(need)
            return [self.language_model.embed_input_ids(ids.long()) for ids in texts]

        tower.start(kind, layouts)
        try:
            x = torch.cat(list(process({"type": PIXELS[kind], PIXELS[kind]: pixels, f"{kind}_grid_thw": grids})))
            left, history = decide(self.pipeline, x, layouts, read, agree=agreed, width=self.width)
        finally:
            tower.forget()
        kept = zip(left.split(history.counts), history.kept(), layouts, steps, strict=True)
        return [with_places(x, self._places(index, layout, step)) for x, index, layout, step in kept]

    def _places(self, index: Tensor, layout: ImageLayout, step: float) -> Tensor:
        """[K, 3] places of kept tokens in a picture or video, relative to its first token."""
        return coordinates(index, Span(0, 0, layout.parts[0], step))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: Any) -> tuple[Tensor, int]:
        if self.pipeline is None:
            return super().get_mrope_input_positions(input_tokens, mm_features)  # type: ignore[misc]
        return prompt_positions(len(input_tokens), self._spans(mm_features))

    def _spans(self, features: Any) -> list[Span]:
        """The pictures and videos that the placeholders of a prompt represent."""
        lengths = {f.mm_position.offset: f.mm_position.length for f in features}
        return [
            Span(offset, lengths[offset], (frames, rows, columns), step)
            for offset, frames, rows, columns, step in self.iter_mm_grid_thw(features)  # type: ignore[attr-defined]
        ]

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | Tensor,
        multimodal_embeddings: Sequence[Tensor],
        mrope_positions: Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[Tensor], Tensor, int]:
        """Embeddings of a chunk without their places, positions of the prompt with these places, and the offset from
        the index of a generated token to its position. A prompt ends with text."""
        if self.pipeline is None:  # vLLM's own pruning of videos
            return super().recompute_mrope_positions(  # type: ignore[misc]
                input_ids, multimodal_embeddings, mrope_positions, num_computed_tokens
            )
        total = mrope_positions.shape[1]
        delta = int(mrope_positions[0, -1]) + 1 - total
        if not len(multimodal_embeddings):
            return multimodal_embeddings, mrope_positions, delta
        ids = torch.as_tensor(input_ids, device=mrope_positions.device)[:total]
        media = (ids == self.config.image_token_id) | (ids == self.config.video_token_id)
        embeddings, places = zip(*map(without_places, multimodal_embeddings), strict=True)
        return embeddings, placed(mrope_positions, media, torch.cat(places), num_computed_tokens), delta

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Tensor | None = None
    ) -> Tensor:
        self.unplaced = None
        if self.pipeline is not None and multimodal_embeddings is not None and len(multimodal_embeddings):
            if multimodal_embeddings[0].shape[-1] != self.visual.out_hidden_size:
                # Some runners, such as vLLM's for CPUs, do not ask for recomputed positions: forward corrects them.
                multimodal_embeddings, places = zip(*map(without_places, multimodal_embeddings), strict=True)
                assert is_multimodal is not None
                self.unplaced = is_multimodal, torch.cat(places)
        embedded: Tensor = super().embed_input_ids(  # type: ignore[misc]
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )
        return embedded

    def forward(self, input_ids: Any, positions: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.unplaced is not None:
            (media, places), self.unplaced = self.unplaced, None
            positions = placed(positions, media.to(positions.device), places, 0)
        return super().forward(input_ids, positions, *args, **kwargs)  # type: ignore[misc]


class Qwen25Processor(Planned, Qwen2_5_VLMultiModalProcessor):
    family = "qwen2_5_vl"


class Qwen2Processor(Planned, Qwen2VLMultiModalProcessor):
    family = "qwen2_vl"

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        if self.pipeline is None and info.ctx.get_mm_config().is_multimodal_pruning_enabled():
            # vLLM itself would refuse this, if this class did not have to recompute positions.
            raise UnsupportedError("--video-pruning-rate: vLLM does not prune videos of Qwen2-VL; name a pipeline")


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25Processor, info=Qwen2_5_VLProcessingInfo, dummy_inputs=Qwen2_5_VLDummyInputsBuilder
)
class Qwen25VL(Pruned, Qwen2_5_VLForConditionalGeneration):
    """Qwen2.5-VL."""


@MULTIMODAL_REGISTRY.register_processor(
    Qwen2Processor, info=Qwen2VLProcessingInfo, dummy_inputs=Qwen2VLDummyInputsBuilder
)
class Qwen2VL(Pruned, Qwen2VLForConditionalGeneration, SupportsMultiModalPruning):
    """Qwen2-VL."""
