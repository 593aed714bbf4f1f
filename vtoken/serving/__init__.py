"""The same pipeline in a serving engine; only `vtoken serve` imports this room."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.serving.entering import embeddings

__all__ = ["embeddings"]

if not TYPE_CHECKING:  # A type checker would take any name for one of these.

    def __getattr__(name: str) -> Any:
        """vLLM imports this package in every process: what needs torch is fetched when it is asked for."""
        if name not in __all__:
            raise AttributeError(f"module 'vtoken.serving' has no attribute {name!r}")
        from vtoken.serving.entering import embeddings

        return embeddings
