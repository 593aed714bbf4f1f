"""`repr()` of a wrapped model's session: what is installed where."""

from __future__ import annotations

import tiny

import vtoken
from vtoken.hooks.state.installed import spans
from vtoken.session import session_of


def test_it_lists_what_is_installed_where() -> None:
    model = tiny.llava()
    with vtoken.wrapped(model, [{"fastervlm": {"keep": 5}}, {"fastv": {"keep": 3, "layer": 2}}]):
        head, *lines = repr(session_of(model)).split("\n  ")
    assert head == "vtoken session of 'fastervlm+fastv' on llava"
    shown = dict(line.split(": ", 1) for line in lines)
    assert shown["Boundary"] == "model.language_model" and shown["LayerGroups"] == "model.language_model.layers.0-3"
    assert (
        "model.vision_tower" in shown["PaddedTower"] and shown["attribute generate"] == "LlavaForConditionalGeneration"
    )


def test_layers_are_told_as_ranges() -> None:
    assert [spans(each) for each in ([3], [0, 1, 2, 3], [0, 2, 3, 7])] == ["3", "0-3", "0,2-3,7"]
