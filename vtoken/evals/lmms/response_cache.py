"""lmms-eval's response cache (`--use_cache`) identifies a model by the words of the command line; the files that they
name can be edited. For models of a class, `identify` adds their `repr` to the key."""

from __future__ import annotations

from functools import wraps
from hashlib import sha256
from typing import Any

from lmms_eval.caching.response_cache import ResponseCache

from vtoken.errors import UnsupportedError


def identify(cls: type) -> None:
    """From now on a cache asks every model of this class for its `repr` before it looks an answer up."""
    execute = ResponseCache.execute

    @wraps(execute)
    def with_identity(self: Any, lm: Any, reqtype: str, requests: list[Any]) -> Any:
        """Raises UnsupportedError: this lmms-eval makes its key of something else."""
        if isinstance(lm, cls):
            if not hasattr(self, "_model_fingerprint_hash"):
                raise UnsupportedError("this lmms-eval's cache cannot tell pipelines apart; leave --use_cache out")
            self._model_fingerprint_hash = sha256(f"{self.model_fingerprint}|{lm!r}".encode()).hexdigest()[:16]
        return execute(self, lm, reqtype, requests)

    ResponseCache.execute = with_identity
