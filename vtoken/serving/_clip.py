"""What a LLaVA's config says about its CLIP or SigLIP tower, and which stages do not fit it: known in the calling
process, before a model is built."""

from __future__ import annotations

from typing import Any, cast

from vtoken.adapters._padded import TOWERS, feature_layers
from vtoken.config import Pipeline
from vtoken.errors import UnsupportedError, about, either
from vtoken.stages import Fact, Stage
from vtoken.stages.facts import read_of

ASPECT = "anyres_max_9"  # how vLLM scales pictures for LLaVA-OneVision


class ClipLike:
    """The vision tower of a LLaVA.

    Attributes:
        depth, heads, scale, cls, feature_layers: as in Encoder, for the whole tower.
        side: patches along the edge of a crop; aspect: the config's `vision_aspect_ratio`, if any.
    """

    def __init__(self, config: Any) -> None:
        vision = config.vision_config
        if vision.model_type not in TOWERS:
            raise UnsupportedError(
                f"a {vision.model_type!r} vision tower cannot be pruned in vLLM, only {either(sorted(TOWERS))}; leave "
                "`vtoken` out of the model's config"
            )
        self.cls, strategy = TOWERS[vision.model_type], config.vision_feature_select_strategy
        if self.cls != (strategy == "default"):
            raise UnsupportedError(
                f"vision_feature_select_strategy={strategy!r} with a {vision.model_type!r} tower makes tokens that are "
                f"no patches, or fewer; use {'default' if self.cls else 'full'!r}"
            )
        self.depth, self.heads = vision.num_hidden_layers, vision.num_attention_heads
        self.scale = (vision.hidden_size // self.heads) ** -0.5
        self.aspect = getattr(config, "vision_aspect_ratio", None)
        self.side = vision.image_size // vision.patch_size
        self.feature_layers = feature_layers(config.vision_feature_layer, self.depth)

    def check(self, pipeline: Pipeline) -> None:
        """Checks the stages against the tower.

        Raises:
            UnsupportedError: names the stage.
        """
        with about(pipeline.written):
            for stage in pipeline.stages:
                if why := self.refusal(stage):
                    raise UnsupportedError(f"stage {stage.name} {why}")

    def refusal(self, stage: Stage) -> str:
        """Why a stage does not fit the tower; "" if it does."""
        if why := stage.tower_incompatibility(self.heads * round(self.scale**-2), 1):
            return f"does not fit the vision tower: {why}"
        for need in self._layered(stage):
            if not -self.depth <= cast(int, need.layer) < self.depth:
                return f"needs {need.name} of layer {need.layer}; there are {self.depth}"
        last = min(self.feature_layers) - 1
        cuts = stage.layers(self.depth) if stage.site == "encoder" else ()
        if stage.site == "encoder" and (not cuts or min(cuts) < 0 or max(cuts) > last):
            return f"acts at encoder layers {list(cuts)}; this model allows 0 to {last} (features are read after that)"
        return ""

    def deepest(self, pipeline: Pipeline) -> int:
        """The last layer that has to run: the last feature layer, or a later one that a stage reads."""
        needs = [need for stage in pipeline.stages for need in self._layered(stage)]
        return max(*self.feature_layers, 0, *(cast(int, need.layer) % self.depth for need in needs))

    def _layered(self, stage: Stage) -> list[Fact]:
        """The facts that a stage reads from layers that it names."""
        return [need for need in stage.needs() if need.name in read_of("encoder layer") and need.layer is not None]


class PackedAsMax9(ClipLike):
    """The tower of a LLaVA-OneVision. vLLM scales large pictures down in one way, whatever the config says."""

    def check(self, pipeline: Pipeline) -> None:
        super().check(pipeline)
        if self.aspect != ASPECT:
            raise UnsupportedError(
                f"the model's config has vision_aspect_ratio={self.aspect!r}, and vLLM scales large pictures down as "
                f"{ASPECT!r} whatever it says; serve the model with transformers (`vtoken serve`), or write "
                f'"vision_aspect_ratio": "{ASPECT}" beside the pipeline in --hf-overrides'
            )
