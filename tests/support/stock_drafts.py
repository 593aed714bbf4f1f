"""Assisted generation of stock transformers, whose drafts see no pictures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from transformers.generation.candidate_generator import AssistedCandidateGenerator


@contextmanager
def counted() -> Iterator[list[int]]:
    """[drafted, accepted] of what stock candidate generators do in the block."""
    found = [0, 0]
    original = AssistedCandidateGenerator.update_candidate_strategy

    def update(self, input_ids, scores, num_matches):
        if type(self) is AssistedCandidateGenerator:
            found[0] += scores.shape[1] - 1
            found[1] += int(num_matches)
        return original(self, input_ids, scores, num_matches)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AssistedCandidateGenerator, "update_candidate_strategy", update)
        yield found
