"""The trace for people: repr, table and HTML; `vtoken.pipeline`; warnings at the user's line."""

from __future__ import annotations

import base64
import re
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import yaml
from PIL import Image
from tiny_processors import processor

import vtoken
from vtoken import config
from vtoken.errors import ConfigError
from vtoken.evals.shared import whole
from vtoken.hooks.state.trace import StageTrace, Trace

STAGES = [{"fastervlm": {"keep": 5}}, {"fastv": {"keep": 3, "layer": 2}}, "xattention", {"snapkv": {"keep": 2}}]


def traced(pipeline: Any, batch: list[list[Any]]) -> Trace:
    model = tiny.llava()
    with vtoken.wrapped(model, pipeline), torch.no_grad():
        model.generate(**tiny.build(model, batch), max_new_tokens=1)
        return vtoken.trace(model)


def test_repr_is_one_line() -> None:
    trace = traced(STAGES, [[3, "img", 5], [4, "img", 2, "img", 3]])
    full = sum(trace.visual_tokens)
    size = f"{trace.cache_bytes / 1e3:.3g}"
    assert 1e6 > trace.cache_bytes > 0 and trace.milliseconds > 0
    assert repr(trace) == (
        f"3 images: {full} -> 15 at fastervlm, xattention stood aside, 15 -> 9 at fastv, 15 -> 6 at snapkv; "
        f"prefill {trace.milliseconds:.1f} ms; cache {size} kB"
    )
    assert re.match(
        rf"1 image: {trace.visual_tokens[0]} -> 5 at fastervlm; ", repr(traced("fastervlm:5", [["img", 7]]))
    )


def test_repr_without_much_to_tell() -> None:
    assert repr(Trace()) == "0 images: 0 tokens"
    untold = StageTrace("press", "cache", [4], [], [])
    sparse = StageTrace("xattention", "attention", [4], [4], [])
    trace = Trace([sparse, untold], visual_tokens=[4], dense_rows=[0, 1, 2], cache_bytes=12_345_000_000)
    assert repr(trace) == "1 image: 4 at xattention, 4 at press; rows 0-2 dense; cache 12.3 GB"


def test_the_prefill_contains_its_decisions() -> None:
    trace = traced(STAGES, [[3, "img", 5]])
    assert trace.milliseconds > sum(stage.milliseconds for stage in trace.stages) > 0
    assert trace.to_dict()["milliseconds"] == trace.milliseconds


def test_the_table_has_a_row_per_stage_and_alike_layers_in_one() -> None:
    trace = traced(STAGES, [[3, "img", 5], [4, "img"]])
    first, *rows = trace.table().splitlines()
    assert first == repr(trace)
    cells = [re.split(r" {2,}", row.strip()) for row in rows if re.match(" *[a-z]", row)]
    full, aside = str(trace.visual_tokens[0]), trace.aside["xattention"]
    assert cells[0] == ["stage", "site", "layer", "tokens in", "tokens out", "ms", "note"]
    assert [row[:4] for row in cells if row[0] in ("fastervlm", "fastv", "snapkv")] == [
        ["fastervlm", "tokens", f"{full}, {full}", "5, 5"],
        ["fastv", "decoder", "2", "5, 5"],
        ["snapkv", "cache", "0-1", "5, 5"],
        ["snapkv", "cache", "2-3", "3, 3"],
    ]
    assert aside in " ".join(" ".join(rows).split())


def test_a_notebook_shows_the_pictures_it_was_told() -> None:
    trace = traced("uniform:4", [[3, "img", 5]])
    assert trace._repr_html_() == f"<pre>{trace.table().replace('>', '&gt;')}</pre>"
    picture = Image.new("RGB", (90, 60), "orange")
    assert trace.with_pictures(picture, processor=processor("llava")) is trace
    shown = re.match(r'<img src="data:image/png;base64,(.*?)"', trace._repr_html_())
    assert shown
    drawn = Image.open(BytesIO(base64.b64decode(shown[1])))
    pixels = np.asarray(drawn.convert("RGB"))
    orange = ((pixels[..., 0] > 200) & (pixels[..., 2] < 60)).mean()
    assert orange == pytest.approx(4 / trace.visual_tokens[0], rel=0.2), "what stays keeps its colour, the rest is grey"
    with pytest.raises(ConfigError, match="the trace has 1 images, 2 were given; give one for each"):
        trace.with_pictures(picture, picture)


def test_what_a_model_is_wrapped_with(tmp_path: Path) -> None:
    model = tiny.llava()
    assert vtoken.pipeline(model) is None
    before = repr(model)
    for given in ("fastervlm-64,newline=drop", [{"dart": {"keep": {"total": 9}}}], "none"):
        with vtoken.wrapped(model, given):
            found = vtoken.pipeline(model)
            assert repr(model) == before
        (tmp_path / "mine.yaml").write_text(repr(found))
        loaded = config.load(tmp_path / "mine.yaml")
        assert found == config.load(given) and repr(loaded) == repr(found) and loaded.stages == found.stages
        assert config.load(yaml.safe_load(repr(found))).stages == found.stages
    assert vtoken.pipeline(model) is None


def test_warnings_point_at_the_line_of_the_user(tmp_path: Path) -> None:
    model = tiny.llava()
    width = model.config.text_config.hidden_size
    with vtoken.wrapped(model, "fastervlm:5"), torch.no_grad(), pytest.warns(UserWarning) as caught:
        model.generate(inputs_embeds=torch.zeros(1, 4, width), max_new_tokens=1)
    (warning,) = [each for each in caught if "inputs_embeds came without pixels" in str(each.message)]
    assert warning.filename == __file__
    text = Path(__file__).read_text(encoding="utf-8").splitlines()[warning.lineno - 1]
    assert text.strip().startswith("model.generate(inputs_embeds")
    (tmp_path / "a.json").write_text("{")
    with pytest.warns(UserWarning, match="taken as missing") as caught:
        whole.kept(tmp_path / "a.json", bool)
    assert caught[0].filename == __file__


def test_one_place_warns() -> None:
    """So that every warning points at the user's line."""
    files = Path(vtoken.__file__).parent.rglob("*.py")
    assert [f.name for f in files if re.search(r"import warnings|from warnings", f.read_text())] == ["errors.py"]
