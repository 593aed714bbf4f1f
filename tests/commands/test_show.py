"""`vtoken show` on every family: rasters, several pictures, videos, and processors without torchvision."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from PIL import Image, ImageDraw
from tiny import FAMILIES, VIDEO, build, make
from tiny_processors import processor, save

from vtoken.commands import show
from vtoken.errors import ConfigError, UnsupportedError, VtokenError
from vtoken.evals import processors
from vtoken.evals.pictures import asked, overlay, traced
from vtoken.evals.pictures.overlay import drawn, views
from vtoken.evals.shared import media, models
from vtoken.evals.shared.options import declare
from vtoken.stages import size_of

RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ((200, 40, 40), (40, 40, 200)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Any:
    found: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in found:
            found[family] = save(family, tmp_path_factory.mktemp(family))
        return found[family]

    return get


@pytest.fixture(scope="module")
def picture(tmp_path_factory: Any) -> Path:
    """Left half red, right half blue, twice as wide as high."""
    path = tmp_path_factory.mktemp("pictures") / "two.png"
    image = Image.new("RGB", (112, 56), (200, 40, 40))
    ImageDraw.Draw(image).rectangle((56, 0, 112, 56), fill=(40, 40, 200))
    image.save(path)
    return path


def run(*words: Any) -> None:
    parser = argparse.ArgumentParser()
    declare(parser, show)
    show.run(show.Settings.of(parser.parse_args([str(word) for word in words])))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_drawn(family: str, folder: Any, picture: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "kept.png"
    run(folder(family), "uniform:4", picture, "--out", out, "--json")
    trace = json.loads(capsys.readouterr().out)
    assert trace["file"] == str(out) and trace["stages"][-1]["tokens_out"] == [4]
    with Image.open(out) as seen:
        rasters = len(trace["parts"][0])
        side = 480 if rasters <= 3 else 280
        assert seen.format == "PNG" and min(seen.size) >= side
        # Several rasters stand side by side, two of them each twice as wide as its own half.
        assert (seen.width > 1.9 * side) == (
            rasters > 1 or tiny.family(family).varlen or tiny.family(family).crops_sized
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_several_pictures_of_one_prompt(family: str, folder: Any, picture: Path, tmp_path: Path, capsys: Any) -> None:
    run(folder(family), "none", picture, picture, "--out", tmp_path / "kept.png", "--json")
    parts = json.loads(capsys.readouterr().out)["parts"]
    assert len(parts) == 2
    if tiny.family(family).crops_one_only:
        assert parts == [[[1, 4, 4]]] * 2


def test_crops_follow_the_pipeline(folder: Any, picture: Path, tmp_path: Path, capsys: Any) -> None:
    """anyres: 2x2 must reach the processor as well."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("anyres: 2x2\nstages: [uniform: {keep: 4}]\n")
    run(folder("llava_next"), mine, picture, "--out", tmp_path / "kept.png", "--json")
    assert json.loads(capsys.readouterr().out)["parts"] == [[[1, 4, 4], [1, 4, 8]]]


@pytest.mark.parametrize("family", VIDEO)
def test_videos_are_drawn_frame_by_frame(
    family: str, folder: Any, monkeypatch: Any, tmp_path: Path, capsys: Any
) -> None:
    """With a stand-in for the video half of the processor, which needs torchvision."""
    frames = tmp_path / "clip"
    frames.mkdir()
    for k in range(6):
        (RED if k < 3 else BLUE).save(frames / f"{k}.png")
    seen: list[Any] = []
    model, stock = make(family), processor(family)

    def call(text: str, return_tensors: str, videos: Any, do_sample_frames: bool) -> Any:
        seen.append((text, [len(video) for video in videos], do_sample_frames))
        steps = 4 // getattr(model.config.vision_config, "temporal_patch_size", 1)
        return _Batch(build(model, [[3, ("video", steps), 4]]))

    stock.video_processor = object()
    monkeypatch.setattr(type(stock), "__call__", lambda self, **given: call(**given))
    monkeypatch.setattr(models, "load_pair", lambda name: (model, stock))
    run("any", "uniform:{per_frame: 2}", frames, "--frames", "4", "--out", tmp_path / "kept.png", "--json")
    ((text, lengths, sampled),) = seen
    assert lengths == [4] and sampled is False and stock.video_token in text
    trace = json.loads(capsys.readouterr().out)
    ((steps, rows, columns),) = trace["parts"][0]
    assert len(trace["stages"][0]["kept"][0]) == 2 * steps
    with Image.open(tmp_path / "kept.png") as sheet:
        assert sheet.width >= steps * 280 * columns / rows


class _Batch(dict):
    def to(self, device: Any) -> _Batch:
        return self


def test_videos_say_what_they_need(folder: Any, tmp_path: Path) -> None:
    clip = tmp_path / "clip.gif"
    RED.save(clip, save_all=True, append_images=[BLUE])
    with pytest.raises(UnsupportedError, match=r"need torchvision.*: pip install .torchvision==0\.\d+\.\*"):
        processors.check_video(processor("qwen3_vl"))
    with pytest.raises(UnsupportedError, match="LlavaNextProcessor takes pictures only"):
        run(folder("llava_next"), "none", clip, "--out", tmp_path / "kept.png")


def test_reading_pictures_and_videos(tmp_path: Path) -> None:
    still, clip, frames, empty = (tmp_path / name for name in ("a.png", "b.gif", "c", "d"))
    RED.save(still)
    many = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(0, 200, 20)]
    many[0].save(clip.with_suffix(".webp"), save_all=True, append_images=many[1:], lossless=True)
    RED.save(clip, save_all=True, append_images=[BLUE])
    frames.mkdir()
    empty.mkdir()
    (frames / "notes.txt").write_text("no frame")
    for k, frame in enumerate(many):
        frame.save(frames / f"{k:02}.png")

    assert media.read([still, still]) == media.Media((RED, RED))
    assert not media.read([still]).video and media.read([still, still]).items == 2
    assert media.read([clip]).video and len(media.read([clip]).pictures) == 2 and media.read([clip]).items == 1
    for video in (clip.with_suffix(".webp"), frames):
        assert [p.getpixel((0, 0))[0] for p in media.read([video], frames=5).pictures] == [20, 60, 100, 140, 180]
    assert len(media.read([frames], frames=50).pictures) == 10
    for wrong, words in (
        (([still, clip],), "b.gif is a video; give one video, or pictures only"),
        (([empty],), "holds no pictures"),
        (([tmp_path / "none.png"],), "cannot read picture"),
        (([frames / "notes.txt"],), "cannot read picture"),
        (([still], 0), "frames must be at least 1"),
    ):
        with pytest.raises(ConfigError, match=words):
            media.read(*wrong)


@pytest.mark.parametrize("family", FAMILIES)
def test_processors_load_with_pillow_alone(family: str, folder: Any, picture: Path) -> None:
    """As their own checkpoints have them: class, padding side, and tokens that the model counts the same."""
    loaded = processors.load(folder(family))
    assert type(loaded).__name__ == type(processor(family)).__name__ and loaded.tokenizer.padding_side == "left"
    model = make(family)
    inputs = asked.prepare(loaded, media.read([picture]), "w1 w2", model)
    with torch.no_grad():
        assert model(**inputs).logits.shape[1] == inputs["input_ids"].shape[1]


def test_what_stands_aside_and_what_is_not_drawn_is_said(
    folder: Any, picture: Path, tmp_path: Path, capsys: Any
) -> None:
    run(folder("llava"), "flexprefill", picture, "--out", tmp_path / "kept.png")
    assert "flexprefill stood aside: the prompt has" in capsys.readouterr().out
    run(folder("llava"), "flowcut-64,min_visual_tokens=600", picture, "--out", tmp_path / "kept.png")
    out = capsys.readouterr().out
    assert "kept.png: 16 of 16 visual tokens kept" in out
    assert "fewer than min_visual_tokens 600" in out
    run(folder("llava"), "snapkv:2", picture, "--out", tmp_path / "kept.png")
    assert "prompt tokens per layer and head; that is not drawn" in capsys.readouterr().out
    with pytest.raises(VtokenError, match="no folder"):
        run("./nowhere", "pool", picture, "--out", tmp_path / "no" / "kept.png")


def test_a_folder_without_processor_is_one_line(tmp_path: Path) -> None:
    make("qwen2_vl").save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="cannot load the processor of") as raised:
        processors.load(tmp_path)
    assert "\n" not in str(raised.value)


def test_kept_indices_run_through_the_rasters() -> None:
    """Tokens 0-3 lie in the first raster, 4-9 in the second."""
    parts = ((1, 2, 2), (1, 2, 3))
    assert size_of(parts) == 10
    out = drawn([RED, BLUE], parts, [3, 4, 9], side=40)
    (first,) = _squares(out, (200, 40, 40))
    assert first == (12 + 20 + 10, 12 + 20 + 10)
    left = 12 + 40 + 12
    assert _squares(out, (40, 40, 200)) == [(left + 10, 12 + 10), (left + 50, 12 + 30)]


def _squares(picture: Image.Image, colour: tuple[int, int, int]) -> list[tuple[int, int]]:
    """Centres of 20-pixel cells that have this colour, in reading order."""
    places = [
        (x, y) for y in range(22, 60, 20) for x in range(22, picture.width, 2) if picture.getpixel((x, y)) == colour
    ]
    return [(x, y) for x, y in places if picture.getpixel((x - 8, y)) == picture.getpixel((x + 8, y)) == colour]


def test_frames_are_named_after_the_pictures_they_hold(monkeypatch: Any) -> None:
    seen: list[str] = []

    def note(picture: Image.Image, *args: Any, caption: str, **more: Any) -> Image.Image:
        seen.append(caption)
        return picture

    monkeypatch.setattr(overlay, "overlay", note)
    drawn([RED] * 7, ((4, 1, 2),), [0, 1, 5])
    assert seen == ["frames 1-2: 2 of 2", "frames 3-4: 0 of 2", "frames 5-6: 1 of 2", "frame 7: 0 of 2"]


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="token 10 lies outside rasters of 10 tokens"):
        drawn([RED, BLUE], ((1, 2, 2), (1, 2, 3)), [10])
    for count in (1, 3):
        with pytest.raises(ValueError, match=f"2 rasters but {count} pictures"):
            drawn([RED] * count, ((1, 2, 2), (1, 2, 3)), [0])


def test_views_are_what_the_rasters_cover(picture: Path) -> None:
    one = media.read([picture])
    pixels = torch.zeros(1, 3, 3, 4, 4)
    plain = argparse.Namespace(do_normalize=False, image_mean=None)
    whole, crops = views(plain, pixels, one, [((1, 4, 4), (1, 4, 8))])[0]
    assert whole.size == (4, 4) and whole.getpixel((0, 0)) == (0, 0, 0) and crops.size == (112, 56)
    assert [v.size for v in views(plain, pixels[:, 0], one, [((1, 4, 4),)])[0]] == [(4, 4)]
    for none in (None, torch.zeros(64, 1176)):
        assert [v.size for v in views(plain, none, one, [((1, 2, 4),)])[0]] == [(112, 56)]
    clip = media.Media((RED, BLUE), video=True)
    assert views(plain, None, clip, [((2, 2, 2),)]) == [[RED, BLUE]]


def test_another_number_of_images_is_an_error() -> None:
    trace = argparse.Namespace(parts=[])
    with pytest.raises(ValueError, match="the prompt shows 1 images but the trace has 0"):
        traced.picture(None, None, media.Media((RED,)), trace, "")
    assert issubclass(ConfigError, VtokenError)
