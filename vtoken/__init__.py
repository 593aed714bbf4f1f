"""vtoken: visual-token pruning for stock Hugging Face VLMs.

Importing this package imports nothing else: the names below fetch their modules when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vtoken.drafts import acceptance, draft
    from vtoken.registry import available
    from vtoken.relevance import distinct_frames, frame_relevance, question_relevance
    from vtoken.saved import push_to_hub, save
    from vtoken.session import match_processor, pipeline, trace, unmatch_processor, unwrap, wrap, wrapped

__version__ = "0.1.0"
__all__ = [
    "acceptance",
    "available",
    "distinct_frames",
    "draft",
    "frame_relevance",
    "match_processor",
    "pipeline",
    "push_to_hub",
    "question_relevance",
    "save",
    "trace",
    "unmatch_processor",
    "unwrap",
    "wrap",
    "wrapped",
]

_NAMES = {
    "drafts": ("acceptance", "draft"),
    "registry": ("available",),
    "relevance": ("distinct_frames", "frame_relevance", "question_relevance"),
    "saved": ("push_to_hub", "save"),
    "session": ("match_processor", "pipeline", "trace", "unmatch_processor", "unwrap", "wrap", "wrapped"),
}
_HOME = {name: f"vtoken.{module}" for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # A type checker would take any name for one of vtoken's.

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'vtoken' has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(_HOME[name]), name)
        return value


def __dir__() -> list[str]:
    return sorted(__all__)
