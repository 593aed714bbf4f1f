"""Shared by all processors here: they refuse pipelines in the calling process, and put the pipeline into the keys of
cached pictures."""

from __future__ import annotations

import threading
from typing import Any, ClassVar

import torch
from vllm.logger import init_logger
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.processing import BaseMultiModalProcessor

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.serving import plan

LOGGER = init_logger("vllm.plugins.vtoken")
TEXT = "vtoken_text"  # token ids of the prompt around a picture, which are passed along with it


def text_key(kind: str) -> str:
    """The key under which these ids are passed along with pictures, or videos."""
    return TEXT if kind == "image" else f"{TEXT}_{kind}"


class Keyed(BaseMultiModalProcessor):
    """A mixin that goes before vLLM's own processor class. Caches may outlive an engine or be shared by several, so
    their keys name the pipeline and, if a stage reads the prompt, the prompt."""

    family: ClassVar[str]
    placeholders_in_config: ClassVar[tuple[str, ...]] = ("image_token_index",)
    # For each kind, an output of the processor with one row per picture or video.
    rows_of: ClassVar[dict[str, str]] = {"image": "pixel_values"}

    def __init__(self, info: Any, dummy_inputs: Any) -> None:
        super().__init__(info, dummy_inputs)
        self._asking = threading.local()
        plan.check_processor_options(info.ctx.get_mm_config().mm_processor_kwargs)
        if (pipeline := self.pipeline) is not None:
            self.check(pipeline)

    @property
    def pipeline(self) -> Pipeline | None:
        return plan.pipeline_of(self.info.get_hf_config())

    def check(self, pipeline: Pipeline) -> None:
        """Refuses pipelines that cannot be served. The engine does not exist yet, so the user sees the error."""
        plan.check_model(pipeline, self.family, self.info.get_hf_config())
        if self.info.ctx.get_mm_config().mm_encoder_tp_mode == "data":
            raise UnsupportedError(
                "mm_encoder_tp_mode=data gives every rank other pictures, and vtoken's decisions are those of rank 0; "
                "leave the option out"
            )
        if plan.reads_text(pipeline):
            LOGGER.warning_once(
                "vtoken: pipeline %s reads the prompt, so a picture is encoded again for every prompt around it, and "
                "prompts share no prefix after a picture",
                pipeline.name,
            )

    def _cached_apply_hf_processor(self, inputs: Any, timing_ctx: Any) -> Any:
        plan.check_processor_options(inputs.hf_processor_mm_kwargs)
        if plan.reads_text(self.pipeline):
            placeholders = {getattr(self.info.get_hf_config(), name) for name in self.placeholders_in_config}
            self._asking.text = [token for token in inputs.prompt if token not in placeholders]
        return super()._cached_apply_hf_processor(inputs, timing_ctx)

    def _postprocess_hf_mm_data(self, mm_inputs: Any, hf_processor_mm_kwargs: Any, processed_data: Any) -> Any:
        for kind, rows in self.rows_of.items() if plan.reads_text(self.pipeline) else ():
            if rows in processed_data:
                text = torch.tensor(self._asking.text)
                processed_data[text_key(kind)] = text.expand(len(processed_data[rows]), -1).contiguous()
        return super()._postprocess_hf_mm_data(mm_inputs, hf_processor_mm_kwargs, processed_data)

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Any:
        fields = super()._get_mm_fields_config(hf_inputs, hf_processor_mm_kwargs)
        return {**fields, **{text_key(kind): MultiModalFieldConfig.batched(kind) for kind in self.rows_of}}

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes, pipeline = super()._get_mm_hashes(inputs), self.pipeline
        if pipeline is None:
            return hashes
        mark = plan.fingerprint(pipeline, inputs.prompt)
        return {modality: [f"{key}-{mark}" for key in keys] for modality, keys in hashes.items()}
