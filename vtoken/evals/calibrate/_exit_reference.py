"""The logits of a model whose visual tokens all leave before a layer, for any layer, from one dense forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vtoken import registry
from vtoken.errors import UnsupportedError
from vtoken.hooks.state.handle import Handle
from vtoken.hooks.state.layer_kinds import firsts, kinds_of, layer_mask


class ExitReference:
    """One dense forward of one prompt, which keeps the hidden states of text tokens before every layer.

    `without(k)` runs layers k and deeper on them alone. Its logits are those of a forward wrapped with `vtw: {layer:
    k}`.

    Attributes:
        columns: [T] where the prompt's text tokens stand.
        behind: how many of them stand in front of the end of the last image.
        entering: per decoder layer, their hidden states [T, D] as it gets them.
        full: [T, V] logits of the untouched model at these tokens.
    """

    @torch.no_grad()
    def __init__(self, model: Any, inputs: dict[str, Tensor]) -> None:
        adapter = registry.adapter(model.config.model_type)(model)
        self.model, self.lm, self.attending = model, adapter.lm, adapter.attending
        self.norm = getattr(self.lm, adapter.final_norm)
        kinds = adapter.visual_kinds(inputs["input_ids"], None)
        if len(kinds) != 1 or not kinds.any():
            raise UnsupportedError("an exit is computed for one prompt with an image at a time")
        self.columns = (kinds[0] == 0).nonzero()[:, 0]
        self.behind = int((self.columns < kinds[0].nonzero().max()).sum())
        self.entering: list[Tensor] = []
        self._rope: list[tuple[Tensor, ...]] = []  # layers of one kind have one of their own
        handle = Handle()
        try:
            for layer in self.lm.layers:
                handle.before(layer, self._look)
            self.full = model(**inputs, use_cache=False).logits[0, self.columns]
        finally:
            handle.release()

    def _look(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        self.entering.append(hidden[0, self.columns])
        self._rope.append(tuple(t[..., self.columns, :] for t in kwargs["position_embeddings"]))

    @torch.no_grad()
    def without(self, layer: int) -> Tensor:
        """[T, V] logits of the text tokens if the visual ones (and newlines) had left before this layer; positions as
        they were."""
        x = self.entering[layer][None]
        masks = {kind: layer_mask(self.lm.config, k, x, None, None) for kind, k in firsts(self.lm.config).items()}
        kinds = kinds_of(self.lm.config)
        for k, each in enumerate(self.lm.layers[layer:], layer):
            # A layer that keeps a state takes what it is given: of one prompt nothing is padding.
            own = masks[kinds[k]] if k in self.attending else None
            x = each(x, attention_mask=own, position_embeddings=self._rope[k], position_ids=None)
        logits: Tensor = self.model.get_output_embeddings()(self.norm(x))[0]
        return logits
