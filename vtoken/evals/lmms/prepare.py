"""What must be installed and set before lmms-eval is imported."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec

from vtoken.errors import VtokenError


def prepare(command: str) -> None:
    """Sets what lmms-eval reads when it is imported."""
    if find_spec("lmms_eval") is None:
        raise VtokenError(
            f'{command} needs lmms-eval: `make eval-venv` in a checkout, or pip install "lmms-eval>=0.7.3,<0.8" with '
            "the torchvision that belongs to your torch"
        )
    # Some tasks of lmms-eval read it without asking whether it is there.
    os.environ.setdefault("HF_HOME", os.path.expanduser("~/.cache/huggingface"))
    quiet()


def prepare_ray() -> None:
    """Raises VtokenError: Ray is not installed."""
    if find_spec("ray") is None:
        raise VtokenError("vtoken sweep --ray needs Ray: pip install ray")


def quiet() -> None:
    """Warnings only, from lmms-eval."""
    import lmms_eval.models  # noqa: F401  # It sets up loguru, so what is set up here must come later.
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING")
