"""kvpress: NVIDIA's presses as stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

from pydantic import Field

from vtoken.compressors.cache import _presses
from vtoken.compressors.cache._slots import hold_text
from vtoken.stages.cache import CachedLayer, CacheStage, Decision, ReplacedKV


class KVPress(CacheStage):
    """Lets a press of the kvpress package shrink the cache, row by row and layer by layer, at the end of the prefill.

    By default text stays: the press scores the tokens, and each KV head keeps the best `1 - compression_ratio` of every
    image, at least one token. With `text: true` the press compresses the whole prompt, as in kvpress itself. On every
    family, presses get the queries that the layer computes; kvpress itself leaves out the norm that Qwen3-VL applies to
    them.

    Refused are presses that only mask keys (AdaKV, DuoAttention, DMS, ...: they save no memory), act while decoding,
    need several passes (KVzip, Finch, ...) or attention maps (ObservedAttention), or move positions (KeyRerotation).

    No paper: an interface to https://github.com/NVIDIA/kvpress, tried with 0.5.5.
    """

    deviations: ClassVar[str] = (
        "Text is kept unless `text: true`; kvpress compresses the whole prompt, and only rows of equal length. A row "
        "without images is left unchanged."
    )
    native: ClassVar[bool] = True

    press: str = Field(description="a press class of kvpress, such as SnapKVPress")
    compression_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="share of tokens that is removed; null: the press's own default"
    )
    options: dict[str, Any] = Field(
        default={}, description="the press's other options; {SnapKVPress: {window_size: 16}} is a press among them"
    )
    text: bool = Field(default=False, description="text may be evicted too, as kvpress does")

    def compressor(self, model: Any) -> Callable[[CachedLayer], Decision]:
        ratio = {} if self.compression_ratio is None else {"compression_ratio": self.compression_ratio}
        press = _presses.press(self.press, {**ratio, **self.options})
        _presses.check(press, self.text)
        press.post_init_from_model(model)

        def compress(layer: CachedLayer) -> Decision:
            try:
                if self.text:
                    return ReplacedKV(*_presses.compressed(press, layer))
                return hold_text(layer, _presses.scores(press, layer), _left(layer.lengths, press.compression_ratio))
            except AssertionError as error:
                raise ValueError(
                    f"{self.press} cannot compress a prompt of {layer.keys.shape[1]} tokens: {error}"
                ) from error

        return compress

    def slots(self, prompt: int, lengths: Sequence[int]) -> int:
        """Only `compression_ratio` is taken into account; wrappers and layer-wise budgets of a press may keep other
        numbers."""
        if self.text:
            return _left((prompt,), self.compression_ratio or 0)[0]
        return prompt - sum(lengths) + sum(_left(lengths, self.compression_ratio or 0))

    def cost(self, prompt: int, lengths: Sequence[int], heads: int, kv_heads: int, head_dim: int) -> None:
        return None


def _left(lengths: Sequence[int], ratio: float) -> tuple[int, ...]:
    """Tokens that stay of each image: at least one, and no rounding error (kvpress leaves 9 of 100 at a ratio of
    0.9)."""
    return tuple(min(n, max(1, int(n * (1 - Fraction(str(ratio)))))) for n in lengths)
