"""`vtoken bench --media`: a picture or a video of the reader's in place of random pixels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import clips
import pytest
import tiny
import torch
from PIL import Image
from tiny_processors import processor, save

from vtoken import registry
from vtoken.cli import main
from vtoken.evals import processors
from vtoken.evals.cost.geometry import random_inputs
from vtoken.evals.shared import models
from vtoken.evals.shared.media import Media
from vtoken.evals.speed.inputs import prepared, random_prompt

FEW = ["--repeats", "1", "--warmup", "0", "--new-tokens", "2", "--text-tokens", "64"]


def report(capsys: Any, *words: Any) -> dict[str, Any]:
    assert main(["bench", *map(str, words), *FEW, "--device", "cpu", "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_picture_of_every_family(family: str, tmp_path: Path, capsys: Any) -> None:
    """It has the tokens that the processor gives it; the oracle is there, so text and pictures stand where they should."""
    picture = tmp_path / "picture.png"
    Image.new("RGB", (112, 56), (200, 40, 40)).save(picture)
    folder = save(family, tmp_path / "model")
    found = report(capsys, folder, "uniform:4", "--media", picture, "--batch", 2)
    shown = prepared(Media((Image.open(picture),)), processor(family), 1, 1)
    adapter = tiny.adapter(tiny.make(family))
    tokens = sum(layout.tokens for layout in adapter.layouts("image", shown))
    assert [row["visual_entry"] for row in found["rows"]] == [2 * tokens, 2 * 4]
    built = not (adapter.masks_outside or adapter.encoder.by_rows)
    assert bool(found["rows"][1]["to_oracle"]) == built and found["conditions"]["media"] == str(picture)
    twice = report(capsys, folder, "uniform:4", "--media", picture, "--images", 2)
    assert twice["rows"][1]["visual_entry"] == 2 * 4


def test_pixels_are_those_of_the_picture() -> None:
    model, picture = tiny.llava(), Image.new("RGB", (56, 56), (200, 40, 40))
    seen = prepared(Media((picture,)), processor("llava"), 3, 2)
    one = processor("llava").image_processor(images=picture, return_tensors="pt")["pixel_values"]
    assert seen["pixel_values"].shape == (6, 3, 56, 56) and (seen["pixel_values"] == one).all()
    prompt = random_prompt(registry.adapter("llava")(model), batch=3, images=2, pictures=seen)
    assert torch.equal(prompt.inputs["pixel_values"], seen["pixel_values"]) and prompt.kind == "image"


class Halves:
    """Stands for the video half of a processor, which needs torchvision: random pixels of the right shape."""

    def __init__(self, config: Any) -> None:
        self.config, self.seen = config, []

    def __call__(self, videos: Any, do_sample_frames: bool, return_tensors: str) -> Any:
        assert do_sample_frames is False
        self.seen += [len(video) for video in videos]
        return random_inputs(self.config, 1, len(videos), len(videos[0]), None, torch.zeros)


@pytest.mark.parametrize("kind", clips.KINDS)
@pytest.mark.parametrize("family", tiny.VIDEO)
def test_video_files(family: str, kind: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    clip, model = clips.write(tmp_path, kind), tiny.make(family)
    stock = processor(family)
    stock.video_processor = Halves(model.config)
    monkeypatch.setattr(models, "load", lambda *given, **named: model)
    monkeypatch.setattr(processors, "load", lambda name: stock)
    found = report(capsys, "any", "uniform:{per_frame: 2}", "--media", clip, "--frames", 4, "--batch", 2)
    assert stock.video_processor.seen == [4, 4] and found["conditions"]["frames"] == 4
    steps = 4 // getattr(model.config.vision_config, "temporal_patch_size", 1)
    assert found["rows"][1]["visual_entry"] == 2 * 2 * steps < found["rows"][0]["visual_entry"]
    report(capsys, "any", "--media", clip)
    assert stock.video_processor.seen[2:] == [8]


def test_what_cannot_be_shown_is_one_line(tmp_path: Path, capsys: Any) -> None:
    clip, picture = clips.write(tmp_path, ".gif"), tmp_path / "a.png"
    Image.new("RGB", (56, 56)).save(picture)
    folder = save("llava", tmp_path / "model")
    capsys.readouterr()  # of saving
    for words, why in (
        (("--media", clip), "LlavaProcessor takes pictures only: this family has no videos"),
        (("--media", tmp_path / "none.png"), "cannot read picture"),
        (("--media", picture, "--image-size", "56"), "--media has a size of its own: leave --image-size out"),
        (("--media", picture, "--break-even", "pool"), "leave --images and --media out"),
    ):
        assert main(["bench", str(folder), *map(str, words), *FEW]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and why in error
