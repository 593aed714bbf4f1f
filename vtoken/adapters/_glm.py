"""What the GLM-4V families share: a tower like Qwen's, in which a convolution joins 2 x 2 patches before the merger,
and one placeholder for both images and video frames."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._packed import GRIDS, Packed
from vtoken.errors import UnsupportedError


class Glm(Packed):
    """Timestamps separate the frames of a video in the prompt; the video is still one layout."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        # Without ids the model looks for the embedding of the config's video_token_id, which no processor writes.
        self.embedded = self.placeholders
        self.placeholders = dict.fromkeys(self.placeholders, model.config.image_token_id)
        self.behind = self.tower.post_layernorm

    def check_call(self, kwargs: dict[str, Any]) -> None:
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if all(kwargs.get(p) is not None or encoded.get(k) is not None for k, (p, _) in GRIDS.items()):
            raise UnsupportedError(
                f"{self.model_type} has one placeholder for images and videos, and transformers fills all of a call's "
                "with either; put images and videos in calls of their own"
            )
