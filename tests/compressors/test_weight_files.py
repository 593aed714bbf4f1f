"""Files of gates, routers, thresholds and patterns that are damaged or foreign: one error when wrapping, which names the file, what in it
is wrong and what was expected."""

from __future__ import annotations

import json

import gates
import pytest
import tiny
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import vtoken
from vtoken import config
from vtoken.errors import ConfigError, VtokenError

MODEL = tiny.make("llava")  # nothing is left on it where `wrap` refuses
THEIRS = "model.layers.{}.self_attn.attn_gate.mask_linear_k.weight"


def thresholds(method):
    return {"method": method}, {name: torch.full((4,), 0.5, dtype=torch.float64) for name in ("thresholds", "left")}


def contents(path):
    with safe_open(path, "pt") as file:
        return file.metadata() or {}, {key: file.get_tensor(key) for key in file.keys()}


# Stage -> option, header, tensors, further options.
FILES = {
    "dyvte": ("gates", *contents(gates.file(1)), {}),
    "dpn_routed": ("routers", *contents(gates.routers()), {"sizes": (1, 2)}),
    "dtome": ("thresholds", *thresholds("dtome"), {}),
    "dtome_post": ("thresholds", *thresholds("dtome_post"), {}),
    "seerattention": ("gates", *contents(gates.seer()), {}),
}


def tensors_gone_wrong(tensors):
    """What -> tensors."""
    for name, t in tensors.items():
        yield name, {k: v for k, v in tensors.items() if k != name}
        others = (
            t[:-1],
            t[None],
            t.flatten()[:0],
            t.to(torch.int32),
            t.clone().fill_(torch.nan),
            t.to(torch.complex64),
        )
        for other in (*others, t.index_fill(0, torch.tensor(0), torch.inf)):
            yield name, {**tensors, name: other}
        if len(tensors) > 1:
            yield name, {**tensors, name: t.half()}
    yield "more", {**tensors, "more": torch.zeros(2)}
    yield "", {}


def headers_gone_wrong(header):
    """What -> header."""
    for key in header:
        yield key, {k: v for k, v in header.items() if k != key}
        for wrong in (
            "",
            "x",
            "-1",
            "0",
            "1.5",
            "NaN",
            "[]",
            "9" * 5000,
            "[1.0, 0.5]",
            "{}",
            "[NaN, 1, 1, 1]",
            "[[1], 1, 1, 1]",
        ):
            yield key, {**header, key: wrong}


def refused(stage, option, file, more, named=""):
    with pytest.raises(VtokenError) as found:
        vtoken.wrap(MODEL, [{stage: {option: str(file), **more}}])
    message = str(found.value)
    assert str(file) in message and named in message and "\n" not in message and len(message) < 600, message
    return message


@pytest.mark.parametrize("stage", FILES)
def test_tensors(stage, tmp_path):
    option, header, tensors, more = FILES[stage]
    for k, (name, wrong) in enumerate(tensors_gone_wrong(tensors)):
        if (name, len(wrong)) in (("left", 1), ("thresholds", 1)) and "thresholds" in wrong:
            continue  # nobody has to have counted
        if (
            name.endswith("out.weight")
            and stage == "dpn_routed"
            and len(wrong.get(name, ())) == 1
            and wrong[name].ndim == 2
        ):
            continue  # one size is a router, too
        file = tmp_path / f"{k}.safetensors"
        save_file({key: t.contiguous() for key, t in wrong.items()}, file, header)
        # Where the first of two is another one than the second fits, the second is named.
        message = refused(stage, option, file, more, "tensor" if name == "thresholds" else name.partition(".")[0])
        assert "expected" in message or not wrong


@pytest.mark.parametrize("stage", ["dyvte", "dtome", "dtome_post", "seerattention"])
def test_headers(stage, tmp_path):
    option, header, tensors, more = FILES[stage]
    for k, (key, wrong) in enumerate(headers_gone_wrong(header)):
        file = tmp_path / f"{k}.safetensors"
        save_file(tensors, file, wrong)
        refused(stage, option, file, more, "thresholds" if key == "method" else key)


@pytest.mark.parametrize("stage", FILES)
def test_bytes(stage, tmp_path):
    option, header, tensors, more = FILES[stage]
    whole = tmp_path / "whole.safetensors"
    save_file(tensors, whole, header)
    data = whole.read_bytes()
    for k, wrong in enumerate(
        (b"", b"{}", data[:-1], data[:40], data[: len(data) // 2], b"\xff" * 200, data + b"x", b"\0" * 64)
    ):
        file = tmp_path / f"{k}.safetensors"
        file.write_bytes(wrong)
        refused(stage, option, file, more)
    refused(stage, option, tmp_path, more)
    with vtoken.wrapped(MODEL, [{stage: {option: str(whole), **more}}]):
        pass


def test_the_authors_gates(tmp_path):
    tensors = {THEIRS.format(k): torch.rand(4, 24, 8) for k in range(4)}
    for k, (name, wrong) in enumerate(tensors_gone_wrong(tensors)):
        file = tmp_path / f"{k}.pth"
        torch.save(wrong, file)
        refused("seerattention", "gates", file, {}, "layers" if name in tensors and name in wrong else "")
    data = file.read_bytes()
    for k, wrong in enumerate((b"", b"x", data[:-10], data[:100], b"\x80\x02]q\x00.", b"PK\x03\x04" * 9)):
        file = tmp_path / f"bytes{k}.pth"
        file.write_bytes(wrong)
        refused("seerattention", "gates", file, {})


def test_numbers_of_static_sparse(tmp_path):
    rows = [[0.1, 0.2]] * 4
    odd = ("", "nul", "1", "[]", "[1]", "[[]]", "{}", "[" * 100_000, "[[true, false]]", '[["a", "b"]]', "[[1e999, 1]]")
    for k, text in enumerate((*odd, json.dumps([*rows[:3], [0.1, float("nan")]]), json.dumps([*rows[:3], [0.1]]))):
        file = tmp_path / f"{k}.json"
        file.write_text(text)
        refused("static_sparse", "gates", file, {})
    assert "layer 3" in refused("static_sparse", "gates", tmp_path / f"{len(odd)}.json", {})
    for k, text in enumerate(("", "a\tb\n", "1\t2\n1\n", "nan\t1\n", "1 2\n3 4\n")):
        file = tmp_path / f"{k}.tsv"
        file.write_text(text)
        refused("static_sparse", "gates", file, {})


def test_a_file_that_changes_between_reading_and_wrapping(tmp_path):
    for stage, (option, header, tensors, more) in FILES.items():
        file = tmp_path / f"{stage}.safetensors"
        save_file(tensors, file, header)
        pipeline = config.load([{stage: {option: str(file), **more}}])
        file.write_bytes(b"torn")
        if stage.startswith("dtome"):
            continue  # holds the numbers
        with pytest.raises(VtokenError, match=str(file)):
            vtoken.wrap(MODEL, pipeline)


def test_inputs_of_the_search(tmp_path):
    from vtoken.evals.calibrate.mminference import saved

    good, prompt = tmp_path / "good.pt", {"input_ids": torch.zeros(1, 3)}
    torch.save(prompt, good)
    assert torch.equal(saved(good)["input_ids"], prompt["input_ids"])
    for k, wrong in enumerate((b"", b"x", good.read_bytes()[:-9], {}, {"input_ids": 1}, [prompt])):
        file = tmp_path / f"{k}.pt"
        file.write_bytes(wrong) if isinstance(wrong, bytes) else torch.save(wrong, file)
        with pytest.raises(ConfigError, match=f"--inputs {file}: .*torch.save"):
            saved(file)
