"""The same pipeline in a serving engine; within vtoken, only `vtoken serve` imports this package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.serving.entering import embeddings

__all__ = ["embeddings"]

if not TYPE_CHECKING:  # A type checker would accept any name here.

    def __getattr__(name: str) -> Any:
        """vLLM imports this package in every process, so names that need torch are imported when first used."""
        if name not in __all__:
            raise AttributeError(f"module 'vtoken.serving' has no attribute {name!r}")
        from vtoken.serving.entering import embeddings

        return embeddings
