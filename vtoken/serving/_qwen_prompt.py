"""Prompts of the Qwen-VLs in vLLM: one placeholder per kept token, and the options that conflict with a pipeline."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

from vllm.multimodal.processing import PromptReplacement

from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.run import ImageLayout
from vtoken.serving import plan
from vtoken.serving._keyed import Keyed
from vtoken.serving._qwen_parts import QwenParts

# Both of vLLM's GPU runners ask for recomputed positions if this rate is above 0; it prunes nothing.
SWITCH = 1e-6


class Planned(Keyed):
    """A mixin for processors: one placeholder per kept token."""

    placeholders_in_config = ("image_token_id", "video_token_id")
    rows_of: ClassVar[dict[str, str]] = {"image": "image_grid_thw", "video": "video_grid_thw"}

    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        check_options(self.info.ctx.get_mm_config())

    def apply(self, inputs: Any, timing_ctx: Any) -> Any:
        config = self.info.get_hf_config()
        if self.pipeline is not None and inputs.prompt[-1:] in ([config.image_token_id], [config.video_token_id]):
            raise ValueError(
                "the prompt ends with a picture or video; with a pipeline of vtoken this model takes prompts that end "
                "with text, as its chat template makes them"
            )
        return super().apply(inputs, timing_ctx)

    def get_dummy_inputs(self, *args: Any, **kwargs: Any) -> Any:
        made = super().get_dummy_inputs(*args, **kwargs)
        return made if self.pipeline is None else replace(made, prompt=[*made.prompt, 0])  # any text

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Any:
        updates, pipeline = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs), self.pipeline
        if pipeline is None:
            return updates
        parts = QwenParts(self.info.get_hf_config())

        def fewer(update: Any) -> Any:
            kind = update.modality

            def replacement(item: int) -> Any:
                given = out_mm_kwargs[kind][item]
                (layout,) = parts.rasters([given[f"{kind}_grid_thw"].data.tolist()])
                return self.placeholders(kind, given, layout, plan.kept(pipeline, layout))

            return PromptReplacement(kind, update.target, replacement)

        return [fewer(update) for update in updates]

    def placeholders(self, kind: str, given: Any, layout: ImageLayout, kept: int) -> Any:
        """The placeholders of a picture or video in the prompt.

        Args:
            given: output of the processor for it.
            kept: number of kept tokens.
        """
        return [QwenParts(self.info.get_hf_config()).placeholders[kind]] * kept


def check_options(options: Any) -> None:
    """Refuses options of the engine that conflict with a pipeline.

    Args:
        options: vLLM's MultiModalConfig.

    Raises:
        UnsupportedError: names the option.
    """
    if options.video_pruning_rate not in (None, 0.0, SWITCH):
        raise UnsupportedError(
            f"--video-pruning-rate {options.video_pruning_rate} is vLLM's own pruning of videos, in whose place a "
            "pipeline of vtoken stands; leave one of the two out (stages evs and vidcom2 do what vLLM's do)"
        )
    if options.enable_mm_embeds:
        raise UnsupportedError(
            "--enable-mm-embeds lets requests bring embeddings, of which a pipeline cannot know what the vision tower "
            "saw; leave it out, or prune in the client and serve the model without a pipeline"
        )
