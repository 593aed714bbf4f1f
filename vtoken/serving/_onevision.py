"""LLaVA-OneVision as vLLM serves it. Pictures as in LLaVA-NeXT, but large ones are scaled down after the tower; the
frames of a video are pooled to half their side, and one newline follows the whole video."""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava_onevision as stock
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.adapters.llava_onevision import video_layout
from vtoken.serving import _next, plan
from vtoken.serving._clip import ClipLike
from vtoken.serving._engine import groups
from vtoken.serving._keyed import Keyed
from vtoken.serving._llava import NAMES


class Packing(_next.Packing):
    """See `_next.Packing`."""

    model_type = "llava_onevision"

    def _merge(self, model: Any, size: Tensor, image: Tensor, **options: Any) -> Any:
        merge = stock.LlavaOnevisionForConditionalGeneration._merge_image_patch_embeddings
        return merge(model, size, image, image_newline=model.image_newline, **options)


class Info(_next.Info, stock.LlavaOnevisionProcessingInfo):
    """Counts as many placeholders as the pipeline keeps tokens and newlines."""

    packs = Packing

    def get_hf_processor(self, **kwargs: object) -> Any:
        processor, config = super().get_hf_processor(**kwargs), self.get_hf_config()
        pipeline = plan.pipeline_of(config)
        if pipeline is None or pipeline.anyres == "model":
            return processor
        processor = copy(processor)
        processor.image_processor = copy(processor.image_processor)
        processor.image_processor.image_grid_pinpoints = config.image_grid_pinpoints
        return processor

    def get_num_video_tokens(self, *, image_width: int, image_height: int, num_frames: int) -> int:
        config = self.get_hf_config()
        pipeline = plan.pipeline_of(config)
        if pipeline is None:
            return self._dense_video(num_frames)
        return plan.placeholders(pipeline, video_layout(num_frames, ClipLike(config).side))

    def _dense_video(self, frames: int) -> int:
        """Placeholders of an unpruned video, whatever the size of its pictures."""
        count = stock.LlavaOnevisionProcessingInfo.get_num_video_tokens
        full: int = count(self, image_width=1, image_height=1, num_frames=frames)
        return full

    def _get_max_video_frames(self, max_tokens: int) -> int:
        """How many frames of a dense video fit: the tokens of a pruned one may not grow with its frames at all."""
        newline = self._dense_video(0)
        return max(0, max_tokens - newline) // (self._dense_video(1) - newline)

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int] | None:
        """Those of the dense model, because which picture keeps most tokens depends on the pipeline."""
        config = self.get_hf_config()
        if plan.pipeline_of(config) is None:
            return None
        most, count = self.get_image_size_with_most_features(), stock.LlavaOnevisionProcessingInfo.get_num_image_tokens
        # The size that vLLM names has the most tokens with the usual crop grids, but not with all.
        sizes = [(most.height, most.width), *config.image_grid_pinpoints]
        image = max(count(self, image_width=width, image_height=height) for height, width in sizes)
        frames = self.get_num_frames_with_most_features(seq_len, mm_counts)
        return {"image": image, "video": self._dense_video(frames)}


class Processor(Keyed, stock.LlavaOnevisionMultiModalProcessor):
    family = "llava_onevision"
    placeholders_in_config = ("image_token_index", "video_token_index")
    rows_of = {"image": "pixel_values", "video": "pixel_values_videos"}


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=stock.LlavaOnevisionDummyInputsBuilder)
class LlavaOnevision(_next.Cropped, stock.LlavaOnevisionForConditionalGeneration):
    """`LlavaOnevisionForConditionalGeneration`."""

    family = "llava_onevision"
    packs = Packing
    hf_to_vllm_mapper = stock.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper | NAMES

    def _process_video_pixels(self, inputs: Any) -> Any:
        if self.served is None:
            return super()._process_video_pixels(inputs)
        videos, out = list(inputs["pixel_values_videos"]), list[Tensor]()
        layouts = [video_layout(len(frames), self.served.side) for frames in videos]
        for some in groups([layout.length for layout in layouts], self.most):
            out += self._left(videos[some], layouts[some], some.start, self._pooled, "video")
        return out

    def _pooled(self, values: Tensor) -> Tensor:
        """[frames, patches, C] -> [ΣN, C]."""
        pooled: Tensor = self.apply_pooling(values)
        return pooled.flatten(0, 1)
