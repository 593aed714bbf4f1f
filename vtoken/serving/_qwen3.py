"""Qwen3-VL as vLLM serves it. Differs from Qwen2.5-VL: what DeepStack adds in early decoder layers comes as additional
channels of the embeddings, and the frames of a video are separate in the prompt, each with a timestamp."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from vllm.config import VllmConfig
from vllm.model_executor.models import qwen3_vl as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout
from vtoken.serving import plan
from vtoken.serving._mrope import Span
from vtoken.serving._qwen import Pruned
from vtoken.serving._qwen_prompt import Planned


class Processor(Planned, stock.Qwen3VLMultiModalProcessor):
    family = "qwen3_vl"

    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        videos = self.info.ctx.get_mm_config().get_limit_per_prompt("video")
        if videos and plan.pictures_only(pipeline, self.family):
            raise UnsupportedError(
                f"pipeline {pipeline.name}: text stands between the frames of a Qwen3-VL video, so vLLM has to know "
                "what is kept of each before it encodes; give every stage a budget per frame (keep: {per_frame: "
                "32}), or serve pictures only (--limit-mm-per-prompt '{\"video\": 0}')"
            )

    def placeholders(self, kind: str, given: Any, layout: ImageLayout, kept: int) -> Any:
        if kind == "image":
            return super().placeholders(kind, given, layout, kept)
        config, frames = self.info.get_hf_config(), layout.parts[0][0]
        return self.get_video_repl(
            tokens_per_frame=[kept // frames] * frames,
            timestamps=given["timestamps"].data,
            tokenizer=self.info.get_tokenizer(),
            vision_start_token_id=config.vision_start_token_id,
            vision_end_token_id=config.vision_end_token_id,
            video_token_id=config.video_token_id,
            select_token_id=True,
        )


@MULTIMODAL_REGISTRY.register_processor(
    Processor, info=stock.Qwen3VLProcessingInfo, dummy_inputs=stock.Qwen3VLDummyInputsBuilder
)
class Qwen3VL(Pruned, stock.Qwen3VLForConditionalGeneration):
    """`Qwen3VLForConditionalGeneration`."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "model") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.width = self.visual_dim

    def _places(self, index: Tensor, layout: ImageLayout, step: float) -> Tensor:
        frames, rows, columns = layout.parts[0]
        area = rows * columns
        if frames > 1 and len(set((index // area).bincount(minlength=frames).tolist())) > 1:
            raise RuntimeError(
                f"pipeline {self.pipeline.name if self.pipeline else ''} left other numbers of tokens of the frames of "
                "a video, whose placeholders stand apart"
            )
        return super()._places(index % area, ImageLayout(((1, rows, columns),)), 1.0)

    def _spans(self, features: Any) -> list[Span]:
        merge, spans = self.parts.merge, []
        for feature in features:
            place, kind = feature.mm_position, feature.modality
            frames, height, width = feature.data[f"{kind}_grid_thw"].data.tolist()
            grid = (1, height // merge, width // merge)
            if kind == "image":
                spans.append(Span(place.offset, place.length, grid))
                continue
            shown = place.is_embed.nonzero()[:, 0].unflatten(0, (frames, -1))
            spans += [Span(place.offset + first, shown.shape[1], grid) for first in shown[:, 0].tolist()]
        return spans
