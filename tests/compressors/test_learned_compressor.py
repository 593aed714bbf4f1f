"""Modules with weights of their own: what fits, what is refused, and when."""

from __future__ import annotations

import pytest
import tiny
import token_modules
import torch
from modes import LOGITS, greedy
from pydantic import Field
from safetensors.torch import load_file, save_file
from token_modules import Backwards, Liar, Queries

import vtoken
from vtoken.errors import ConfigError, VtokenError
from vtoken.stages import Compressor, Fact, Keep, VisualTokens, keep_all

NAME = "learned_compressor"
WIDTH = tiny.TEXT["hidden_size"]


def bad(tmp_path, case: str) -> dict[str, str]:
    good = token_modules.options()
    file, tensors = str(tmp_path / "other.safetensors"), load_file(good["weights"])
    if case == "shape":
        tensors["mix.bias"] = tensors["mix.bias"][:-1].clone()
    elif case == "missing":
        del tensors["mix.bias"]
    save_file(tensors, file, {"config": '{"width": 5, "depth": 3}' if case == "config" else f'{{"width": {WIDTH}}}'})
    named = {
        "form": "token_modules.Halves",
        "package": "no_such_package:Halves",
        "class": "token_modules:Thirds",
        "kind": "torch.nn:Linear",
    }
    return {"module": named.get(case, good["module"]), "weights": "none.safetensors" if case == "file" else file}


@pytest.mark.parametrize(
    "case, says",
    [
        ("form", "package.module:Class"),
        ("package", "install the package"),
        ("class", "cannot be imported"),
        ("kind", "derive it from"),
        ("shape", "mix.bias"),
        ("missing", "no tensor 'mix.bias'"),
        ("config", "cannot be built from `config`"),
        ("file", "no file 'none.safetensors'"),
    ],
)
def test_refused_before_a_model_is_touched(case, says, tmp_path):
    with pytest.raises(ConfigError, match=says):
        vtoken.wrap(tiny.make("llava"), [{NAME: bad(tmp_path, case)}])


def test_another_width_is_refused_when_wrapping():
    model = tiny.make("llava")
    with pytest.raises(VtokenError, match=f"takes {WIDTH + 1} channels"):
        vtoken.wrap(model, [{NAME: token_modules.options(width=WIDTH + 1)}])
    with vtoken.wrapped(model, [{NAME: token_modules.options()}]):
        greedy(model, tiny.build(model, [["img", 3]], seed=1), 1)


@pytest.mark.parametrize(
    "options, says",
    [
        (token_modules.options(Liar), "expected"),
        (token_modules.options(Backwards), "not ascending"),
        (token_modules.options(Queries, width=5, out=WIDTH), "takes 5 channels and is given features of"),
    ],
    ids=["counts", "places", "features"],
)
def test_a_module_that_breaks_its_contract(options, says):
    """The call fails, and the model stays usable."""
    model = tiny.make("llava")
    batch = tiny.build(model, [["img", 3]], seed=1)
    dense = greedy(model, batch)
    with vtoken.wrapped(model, [{NAME: options}]), pytest.raises(ValueError, match=says):
        greedy(model, batch)
    assert torch.equal(greedy(model, batch), dense)


class Width(Compressor):
    """Notes how wide the encoder's features are."""

    name = "width"
    site = "tokens"
    seen: list[int] = Field(default_factory=list)

    def needs(self) -> tuple[Fact, ...]:
        return (Fact("features"),)

    def select(self, tokens: VisualTokens) -> Keep:
        self.seen.append(tokens.fact("features").shape[1])
        return keep_all(tokens)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_reader_of_features(family):
    """Three tokens for every picture of more, whatever the family."""
    model, look = tiny.make(family), Width()
    batch = tiny.build(model, [["img", 3], [2, "img", "img", 4]], seed=2)
    with vtoken.wrapped(model, [look]):
        dense = greedy(model, batch, 1, **LOGITS).logits[0]
        full = vtoken.trace(model).tokens_out
    options = token_modules.options(Queries, width=look.seen[0], out=WIDTH)
    with vtoken.wrapped(model, [{NAME: options}]):
        logits = greedy(model, batch, 1, **LOGITS).logits[0]
        assert vtoken.trace(model).tokens_out == [min(3, n) for n in full]
    assert logits.isfinite().all() and not torch.equal(logits, dense)
