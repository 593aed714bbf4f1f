"""`vtoken bench --drafts`."""

from __future__ import annotations

import json

import pytest
import tiny

import vtoken
from vtoken.cli import main
from vtoken.commands.bench import drafted
from vtoken.errors import ConfigError
from vtoken.evals.speed.drafted import measure

OPTIONS = {"new_tokens": 5, "repeats": 2, "warmup": 1, "text_tokens": 5}


def test_drafts_against_plain_decoding():
    model = tiny.llava()
    found = measure(model, ["none", "specvlm:3"], **OPTIONS)
    assert vtoken.pipeline(model) is None
    copy, pruned = found.rows
    assert (copy.name, copy.acceptance, copy.same, pruned.same) == ("none", 1, True, True)
    assert copy.per_step > 1 and 1 <= pruned.per_step <= copy.per_step
    for row in found.rows:
        assert set(row.to_plain) == {"decode", "end_to_end"} and all(each.low > 0 for each in row.to_plain.values())
    head, plain, *rows = drafted(found)
    assert len(head) == len(plain) == len(rows[0]) and rows[0][1] == "100.0%" and rows[0][-1] == "the same"
    assert json.loads(json.dumps(found.to_dict()))["rows"][0]["acceptance"] == 1


def test_another_checkpoint_drafts():
    model, other = tiny.llava(), tiny.make("llava", seed=1)
    (row,) = measure(model, ["none"], other, **OPTIONS).rows
    assert row.same and row.acceptance < 1 and vtoken.pipeline(other) is None


def test_what_cannot_be_measured_is_refused():
    for wrong in ({"batch": 2}, {"new_tokens": 2}):
        with pytest.raises(ConfigError, match="batch 1, 3 new tokens"):
            measure(tiny.llava(), ["none"], **{**OPTIONS, **wrong})


@pytest.mark.parametrize("words", [["--drafts"], ["none", "--drafts", "--break-even"], ["none", "--draft-model", "x"]])
def test_the_command_needs_pipelines_of_drafts(words, capsys):
    assert main(["bench", "tiny-llava", *words]) != 0
    assert "--drafts compares pipelines of a draft" in capsys.readouterr().err
