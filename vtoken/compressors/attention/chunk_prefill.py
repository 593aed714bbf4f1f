"""Chunk prefill, after Video-XL-2, on stock models: a chunk of frames reads itself and the chunks just before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from vtoken.compressors._chunks import frames_of, packed
from vtoken.compressors.attention._singles import listed
from vtoken.stages import Parts
from vtoken.stages.attention import PrefillQK, SparseAttention, SparseMask, causal, everything


class ChunkPrefill(SparseAttention):
    """Every `frames` frames form a chunk, counted through all pictures and videos of the prompt. A visual token reads
    its own chunk, the `previous` chunks before it, and all text before it (time stamps and newlines are text). Text
    reads everything before it, as usual. All heads and layers read the same.

    Chunks are read in whole blocks of `size` tokens, never less than the rule says; text within such blocks as single
    keys. Attention then grows with the length of a video instead of its square. The first layer waits for the device.

    Video-XL-2 is trained with vision tokens made for this; a stock model is not. In a stock model, information from
    frames farther back reaches a frame only through the chunks in between, layer by layer.

    Paper: https://arxiv.org/abs/2506.19225
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.19225"
    deviations: ClassVar[str] = (
        "On stock models, which were not trained for it. The authors mask a dense attention, which saves nothing; here "
        "blocks that are not read are not computed. Their units are four frames of one trained map, with a time stamp "
        "before each; here chunks are counted in the model's own frames (Qwen: pairs of frames), 16 for their 4 units. "
        "Text between videos reads everything and is read by all that follows, as their time stamps; a prompt of "
        "pictures is chunked as a video is."
    )

    frames: int = Field(default=16, ge=1, description="frames of a chunk, pairs of frames on Qwen; a picture is one")
    previous: int = Field(default=3, ge=0, description="chunks before its own that a token reads")
    size: Literal[16, 32, 64, 128, 256] = Field(default=128, description="tokens of a block")

    def reads(self, prompt: PrefillQK) -> SparseMask:
        def work() -> SparseMask:
            return self._reads(prompt.image, prompt.raster_index, prompt.parts)

        found: SparseMask = prompt.once(("chunk_prefill", self), work)
        n, heads = prompt.length, prompt.heads
        if found.columns is None or found.dense is None:
            return SparseMask(self.size, everything(heads, n, n, self.size, prompt.q.device))
        blocks, columns, dense = (x.expand(heads, *x.shape[1:]) for x in (found.blocks, found.columns, found.dense))
        return SparseMask(self.size, blocks, columns, found.share, dense)

    def _reads(self, image: Tensor, raster_index: Tensor, parts: Sequence[Parts]) -> SparseMask:
        """The mask of one head; blocks alone if everything is read."""
        n, device, size = len(image), image.device, self.size
        text = image < 0
        chunk = frames_of(image, raster_index, parts).div(self.frames, rounding_mode="floor")
        newest = pad(chunk.masked_fill(text, -1), (0, -n % size), value=-1).view(-1, size).amax(1)
        oldest = pad(chunk.masked_fill(text, n), (0, -n % size), value=n).view(-1, size).amin(1)
        # Blocks of text are read whole, other text key by key.
        words = newest < 0
        single = text & ~words.repeat_interleave(size)[:n]
        count, last = torch.stack([single.sum(), chunk.max()]).tolist() if n else (0, 0)
        if last <= self.previous:
            return SparseMask(size, everything(1, n, n, size, device))
        read = words | (newest >= oldest[:, None] - self.previous)
        blocks = (read & ~words[:, None] & causal(read))[None]
        return SparseMask(size, blocks, listed(single, max(1, count))[None, None], len(words), text[None])

    def density_of(self, length: int, layer: int, counts: Sequence[int], parts: Sequence[Parts]) -> float | None:
        image, raster_index = (pad(x, (0, length - len(x)), value=-1) for x in packed(counts, parts))
        return float(self._reads(image, raster_index, parts).density())
