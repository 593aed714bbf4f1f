"""What generated tokens read of the KV cache, layer by layer."""

from __future__ import annotations

from vtoken.evals.cost.cache import cache_slots, stored
from vtoken.evals.cost.token_flow import TokenFlow
from vtoken.stages.decode import DecodeStage


class DecodeReads:
    """Of one batch row. Adds to `flow.left_out` what could not be counted.

    Attributes:
        stage: that chooses what is read; None: everything is.
    """

    def __init__(self, flow: TokenFlow) -> None:
        self.flow, decoder = flow, flow.shape.decoder
        self.stage = next((stage for stage in flow.stages if isinstance(stage, DecodeStage)), None)
        acting = set() if self.stage is None else set(self.stage.layers(decoder.depth))
        self.acting = [layer for layer in flow.shape.decoder.attending if layer in acting]
        for layer in self.acting:
            self._explain(layer)

    def slots(self, layer: int, step: int) -> float:
        """Slots whose key and value a key head reads at a layer that attends, the mean over its heads, in the decode
        step after `step` others; the token's own is one."""
        flow = self.flow
        if (cached := cache_slots(flow, layer, step + 1)) is not None:
            return cached
        every = stored(flow.decoded[layer] + step, flow.shape.decoder.windows[layer]) + 1
        if self.stage is None or not any(flow.decoder[layer]):
            return every
        found = self.stage.slots_read(layer, self.acting, flow.decoded[layer], flow.decoder[layer], step)
        return every if found is None else found

    def to_choose(self, layer: int, step: int) -> float:
        """What choosing them reads besides, in slots."""
        prompt, images = self.flow.decoded[layer], self.flow.decoder[layer]
        if self.stage is None or not self.stage.thins(layer, self.acting, prompt, images):
            return 0
        return self.stage.read_to_choose(layer, self.acting, prompt, images, step)

    def flops(self, steps: int) -> int:
        """Of attention over so many steps, with what choosing computes."""
        one = 2 * self.flow.shape.decoder.scores(1, 1)
        read = (
            self.slots(layer, step) + self.to_choose(layer, step)
            for layer in self.flow.shape.decoder.attending
            for step in range(steps)
        )
        return round(one * sum(read))

    def _explain(self, layer: int) -> None:
        stage, prompt, images = self.stage, self.flow.decoded[layer], self.flow.decoder[layer]
        assert stage is not None
        if any(images) and prompt < stage.min_len:
            why = f"{stage.name} stands aside: {prompt} tokens are fewer than min_len {stage.min_len}"
            self.flow.left_out += [] if why in self.flow.left_out else [why]
