"""LLaVA-1.5 as vLLM serves it, with a pipeline in its tower and after its projector."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor
from transformers import PixtralVisionConfig
from vllm.config import VllmConfig
from vllm.model_executor.models import llava as stock
from vllm.model_executor.models.utils import WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from vtoken.config import Pipeline
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.run import ImageLayout
from vtoken.serving import plan
from vtoken.serving._clip import ClipLike
from vtoken.serving._engine import check_engine
from vtoken.serving._keyed import LOGGER, Keyed, text_key
from vtoken.serving._tower import ServedTower, agreed
from vtoken.serving.decide import decide
from vtoken.stages import Fact

# From 5.20 on, transformers saves the tower without the name of its inner module.
NAMES = WeightsMapper(
    orig_to_new_regex={
        re.compile(r"^(model\.)?vision_tower\.(?=embeddings\.|encoder\.|pre_layrnorm\.|post_layernorm\.|head\.)"): (
            "vision_tower.vision_model."
        )
    }
)


class Info(stock.LlavaProcessingInfo):
    """Counts as many placeholders as the pipeline keeps tokens."""

    def get_num_image_tokens(self, *, image_width: int, image_height: int) -> int:
        pipeline = plan.pipeline_of(self.get_hf_config())
        if pipeline is None:
            full: int = super().get_num_image_tokens(image_width=image_width, image_height=image_height)
            return full
        side = ClipLike(self.get_hf_config()).side
        return plan.kept(pipeline, ImageLayout(((1, side, side),)))


class Processor(Keyed, stock.LlavaMultiModalProcessor):
    family = "llava"


def info_of(ctx: Any) -> Any:
    """`Info`; for Pixtral, which vLLM serves with the same model class, vLLM's own. Refuses Pixtral with a pipeline."""
    config = ctx.get_hf_config()
    if not isinstance(config.vision_config, PixtralVisionConfig):
        return Info(ctx)
    if plan.pipeline_of(config) is not None:
        ClipLike(config)
    return stock.PixtralHFProcessingInfo(ctx)


def processor_of(info: Any, dummy_inputs: Any) -> Any:
    made = Processor if isinstance(info, Info) else stock.PixtralHFMultiModalProcessor
    return made(info, dummy_inputs)


class Pruned:
    """A mixin that goes before vLLM's own model class. Without a pipeline in the config, the model is the stock one."""

    family: ClassVar[str]
    pipeline: Pipeline | None = None
    served: ServedTower | None = None
    select_layers: list[int] | None = None
    texts: Any
    config: Any
    multi_modal_projector: Any
    language_model: Any

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        config, handle = vllm_config.model_config.hf_config, Handle()
        pipeline, layer, deeper = plan.pipeline_of(config), config.vision_feature_layer, False
        if pipeline is not None:
            tower = ClipLike(config)
            deeper = tower.deepest(pipeline) > max(tower.feature_layers)
            if deeper:  # a stage reads a layer after the feature layer, where vLLM stops building the tower
                handle.set(config, "vision_feature_layer", tower.deepest(pipeline) + 1)
        try:
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        finally:
            handle.release()
        if deeper and self.select_layers is None:
            self.select_layers = [layer] if isinstance(layer, int) else list(layer)
        self.engine, self.texts = vllm_config, None
        self.install(pipeline)

    def install(self, pipeline: Pipeline | None) -> None:
        """Installs hooks for what the stages read and do in the tower; a second call replaces the first."""
        if self.served is not None:
            self.served.context.handle.release()
        self.pipeline, self.served = pipeline, None
        if pipeline is None:
            return
        plan.check_model(pipeline, self.family, self.config)
        check_engine(self.engine, pipeline)
        self.served = ServedTower(self, pipeline)
        crop = ImageLayout(((1, self.served.side, self.served.side),))
        LOGGER.info(
            "vtoken: %s, a picture of one crop: %d -> %d tokens", pipeline.name, crop.tokens, plan.kept(pipeline, crop)
        )

    @property
    def most(self) -> int:
        """Largest number of visual tokens that the dense model is given in one call."""
        return int(self.engine.scheduler_config.max_num_encoder_input_tokens)

    def embed_multimodal(self, **kwargs: object) -> Any:
        self.texts = {kind: kwargs.pop(text_key(kind), None) for kind in ("image", "video")}
        embeds = kwargs.get("image_embeds")
        if isinstance(embeds, list):  # of different lengths, which vLLM's schema does not allow
            return tuple(embeds)
        return super().embed_multimodal(**kwargs)  # type: ignore[misc]

    def _image_pixels_to_features(self, vision_tower: Any, pixel_values: Any) -> Any:
        if self.select_layers is None:
            return super()._image_pixels_to_features(vision_tower, pixel_values)  # type: ignore[misc]
        strategy = self.config.vision_feature_select_strategy
        return vision_tower(pixel_values, select_layers=self.select_layers, feature_select_strategy=strategy)

    def choose(self, x: Tensor, layouts: Sequence[ImageLayout], first: int, pack: Any, kind: str = "image") -> Any:
        """Lets the stages choose among the outputs of the tower.

        Args:
            x: [crops, patches, D] projected; rows of tokens dropped in the tower are zero.
            first: index, in this call, of the first of these pictures.
            pack: [crops, patches, C] -> [ΣN, C], tokens of the pictures.
            kind: "image" or "video".

        Returns:
            [ΣK, D] and the history.
        """
        assert self.pipeline is not None and self.served is not None
        tower = self.served
        history = tower.state.history if tower.state is not None and tower.state.short else None

        def live(values: Tensor) -> Tensor:
            packed: Tensor = pack(values)
            return packed if history is None else packed[history.places]

        def read(need: Fact) -> Any:
            if need.name != "text":
                return live(tower.fact(need))
            ids = self.texts[kind][first : first + len(layouts)]
            return [self.language_model.embed_input_ids(row.long()) for row in ids]

        # Calls forward directly: the hooks on the projector expect whole pictures.
        project = self.multi_modal_projector.forward
        try:
            return decide(self.pipeline, live(x), layouts, read, project=project, agree=agreed, history=history)
        finally:
            tower.forget()


@MULTIMODAL_REGISTRY.register_processor(processor_of, info=info_of, dummy_inputs=stock.LlavaDummyInputsBuilder)
class Llava(Pruned, stock.LlavaForConditionalGeneration):
    """`LlavaForConditionalGeneration`."""

    family = "llava"
    hf_to_vllm_mapper = stock.LlavaForConditionalGeneration.hf_to_vllm_mapper | NAMES

    def _process_image_input(self, image_input: Any) -> Any:
        if self.served is None or image_input["type"] != "pixel_values":
            return super()._process_image_input(image_input)
        side = self.served.side
        layout = ImageLayout(((1, side, side),))
        out: list[Tensor] = []
        # The dense model would be given this many at once; the engine counts only kept tokens.
        for pixels in image_input["pixel_values"].split(max(1, self.most // layout.tokens)):
            x = super()._process_image_input({"type": "pixel_values", "pixel_values": pixels})
            left, history = self.choose(x, [layout] * len(pixels), len(out), lambda values: values.flatten(0, 1))
            out += left.split(history.counts)
        return tuple(out)
