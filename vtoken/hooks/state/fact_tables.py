"""Facts that a family gives in place of others."""

from __future__ import annotations

from collections.abc import Mapping

from vtoken.stages import Stage


def substituted(stage: Stage, substitutes: Mapping[str, str]) -> dict[str, str]:
    """Facts that the stage asks for and the family replaces -> what it gives."""
    return {need.name: substitutes[need.name] for need in stage.needs() if need.name in substitutes}
