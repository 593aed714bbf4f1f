"""What the stages of the recipe need to know about a model: one Family per reference model."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from .batches import PRESENCE, Labels, Pictures
from .build import WIDTH
from .dialogue import VOCABULARY
from .oracle import Oracle
from .pictures import COLOUR_NAMES, GRID, PATCH
from .recipe import Recipe


class Heads(nn.Module):
    """Read-outs of the tower; used in training only."""

    def __init__(self) -> None:
        super().__init__()
        self.glyph = nn.Linear(WIDTH, 11)
        self.colour = nn.Linear(WIDTH, len(COLOUR_NAMES) + 1)
        self.column = nn.Linear(WIDTH, GRID)
        self.presence = nn.Linear(WIDTH, PRESENCE)
        self.presence_last = nn.Linear(WIDTH, PRESENCE)


# Of both LLaVA processors.
LLAVA = {
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
    "num_additional_image_tokens": 1,  # the CLS that the tower adds and the selection drops
    "image_token": "<image>",
}


class Family(ABC):
    """One reference model. N is `tokens`, the visual tokens of a full picture in the order of the prompt; D the width
    of the decoder."""

    name: ClassVar[str]
    recipe: ClassVar[Recipe]
    plan: ClassVar[tuple[str, ...]]  # cycles of stages, in order
    tokens: ClassVar[int]
    words: ClassVar[dict[str, int]] = VOCABULARY
    prefix: ClassVar[tuple[str, ...]] = ("<bos>", "USER", ":")  # what the chat template puts before the image
    suffix: ClassVar[tuple[str, ...]] = ()  # and behind it
    video: ClassVar[dict[str, Any] | None] = (
        None  # settings of the stock video processor, which only torchvision could build and save
    )
    hinted: ClassVar[int | None] = None  # the decoder layer before which visual tokens are to equal `hint`

    @abstractmethod
    def model(self) -> Any:
        """The stock model as training begins."""

    @abstractmethod
    def processor(self) -> Any:
        """Its stock processor, on Pillow alone."""

    def sight(self, model: Any) -> dict[str, nn.Module]:
        """The modules before the decoder: "tower" and, where it is one of its own, "projector"."""
        return {"tower": model.model.vision_tower, "projector": model.model.multi_modal_projector}

    @abstractmethod
    def see(self, model: Any, heads: Heads, batch: Pictures) -> tuple[torch.Tensor, torch.Tensor]:
        """Visual tokens [B, N, D] and the loss of the read-outs. Crops give fewer than N."""

    @abstractmethod
    def labels(self, batch: Pictures) -> torch.Tensor:
        """The glyph of every visual token, 0 = background: [B, N]."""

    @abstractmethod
    def target(self, model: Any, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        """What a perfect eye would see, [B, N, D]."""

    def hint(self, oracle: Oracle, batch: Pictures) -> torch.Tensor:
        """What the visual tokens are to be before decoder layer `hinted`, [B, N, D]."""
        raise NotImplementedError

    def places(self, keep: torch.Tensor, start: int) -> tuple[torch.Tensor, int]:
        """Positions of the kept visual tokens ([B, K], or [3, B, K] where they have three) when the picture begins at
        `start`, and the position behind it."""
        return keep + start, start + self.tokens

    def inputs(self, model: Any, visual: torch.Tensor, keep: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
        """Inputs of the decoder: prefix, the kept visual tokens, suffix, text; each at the position it has in the full
        prompt."""
        embed = model.get_input_embeddings()
        prefix, suffix = (
            torch.tensor([self.words[word] for word in part], dtype=torch.long, device=text.device).expand(
                len(text), -1
            )
            for part in (self.prefix, self.suffix)
        )
        behind = torch.cat([suffix, text], 1)
        kept = visual.gather(1, keep[..., None].expand(-1, -1, visual.shape[-1]))
        spots, after = self.places(keep, len(self.prefix))
        before_at, behind_at = (
            torch.arange(first, first + ids.shape[1], device=text.device).expand(*spots.shape[:-1], -1)
            for first, ids in ((0, prefix), (after, behind))
        )
        embeds = torch.cat([embed(prefix), kept.to(embed.weight.dtype), embed(behind)], 1)
        return {
            "inputs_embeds": embeds,
            "position_ids": torch.cat([before_at, spots, behind_at], -1),
            "attention_mask": torch.ones(embeds.shape[:2], dtype=torch.long, device=text.device),
        }


def clip_states(tower: Any, pixels: torch.Tensor, positions: torch.Tensor) -> list[torch.Tensor]:
    """Hidden states of a CLIP tower for pictures whose patches stand at `positions` of its grid; CLS comes first."""
    embeddings = tower.embeddings
    patches = embeddings.patch_embedding(pixels).flatten(2).transpose(1, 2)
    first = embeddings.class_embedding.expand(len(patches), 1, -1)
    positions = torch.cat([torch.zeros_like(positions[:, :1]), positions + 1], 1)
    states = [tower.pre_layrnorm(torch.cat([first, patches], 1) + embeddings.position_embedding(positions))]
    for layer in tower.encoder.layers:
        states.append(layer(states[-1], None))
    return states


def presence_loss(heads: Heads, states: list[torch.Tensor], presence: torch.Tensor) -> torch.Tensor:
    """What the picture holds, told from CLS where the features are taken and at the last layer. No attention map is
    supervised."""
    weight = torch.ones_like(presence[0]) / presence.shape[1] * 4
    selected, last = heads.presence(states[-2][:, 0]).float(), heads.presence_last(states[-1][:, 0]).float()
    bce = F.binary_cross_entropy_with_logits
    return (
        bce(selected, presence, weight, reduction="none").sum(-1).mean()
        + 0.5 * bce(last, presence, weight, reduction="none").sum(-1).mean()
    )


def read_out_loss(heads: Heads, states: torch.Tensor, seen: Labels) -> torch.Tensor:
    """Glyph and colour of every cell told from its state [B, N, D]; background counts little."""
    weight = torch.where(seen.glyph > 0, 1.0, 0.1).flatten()
    loss = torch.zeros_like(weight)
    for head, target in ((heads.glyph, seen.glyph), (heads.colour, seen.colour)):
        loss = loss + F.cross_entropy(head(states).float().flatten(0, 1), target.flatten(), reduction="none")
    return (loss * weight).sum() / weight.sum()
