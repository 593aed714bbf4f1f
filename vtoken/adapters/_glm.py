"""What the GLM-4V families share: a tower of Qwen's kind, whose 2 x 2 patches a convolution joins before the merger,
and one placeholder for images and for the frames of videos."""

from __future__ import annotations

from typing import Any

from vtoken.adapters._packed import GRIDS, Packed
from vtoken.errors import UnsupportedError


class Glm(Packed):
    """The prompt parts the frames of a video by timestamps; a video is one layout all the same."""

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
