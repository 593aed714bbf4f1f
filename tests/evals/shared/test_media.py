"""Pictures as transformers' own loader shows them, and files that are none."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import clips
import numpy as np
import pytest
import tiny
from PIL import Image, ImageFile, ImageSequence
from tiny_processors import processor
from transformers.image_utils import load_image

from vtoken.errors import ConfigError, UnsupportedError
from vtoken.evals import processors
from vtoken.evals.calibrate import dtome
from vtoken.evals.lmms import prompts
from vtoken.evals.shared import media, samples

RED, BLUE = (Image.new("RGB", (60, 40), colour) for colour in ((200, 40, 40), (40, 40, 200)))


def sample(file: Path) -> Any:
    """The picture that a processor is given."""
    seen = []

    def take(images: Any, **rest: Any) -> Any:
        seen.extend(images[0])
        return {}

    class Processor:
        def apply_chat_template(self, *args: Any, **rest: Any) -> str:
            return ""

        def __call__(self, **given: Any) -> Any:
            return take(**given)

    samples.prepare(None, Processor(), samples.Sample(file, "what?"))
    return seen[0]


READERS = {
    "still": media.still,
    "read": lambda file: media.read([file]).pictures[0],
    "sample": sample,
    "lmms-eval": lambda file: prompts.from_chat(
        [{"role": "user", "content": [{"type": "image", "url": str(file)}]}], 8
    ).images[0],
    "dtome": dtome._open,
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


@every_reader
@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
def test_pictures_are_turned_by_their_orientation(reader: Any, turn: int, suffix: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    picture = Image.fromarray(np.random.RandomState(0).randint(0, 255, (6, 9, 3), dtype=np.uint8)).resize((45, 30))
    picture.save(tmp_path / f"a.{suffix}", exif=exif)
    own = reader(tmp_path / f"a.{suffix}")
    assert own.size == ((45, 30) if turn < 5 else (30, 45)) and own.mode == "RGB"
    assert own.tobytes() == load_image(str(tmp_path / f"a.{suffix}")).tobytes()


@every_reader
@pytest.mark.parametrize("name", ["a.mpo", "a.jpg", "a.tiff"])
def test_a_picture_with_more_behind_it_is_a_picture(reader: Any, name: str, tmp_path: Path) -> None:
    kind = "TIFF" if name.endswith("tiff") else "MPO"
    RED.copy().save(tmp_path / name, kind, save_all=True, append_images=[BLUE.copy() for _ in range(3)])
    with Image.open(tmp_path / name) as file:
        assert file.n_frames == 4
    assert not media.read([tmp_path / name, tmp_path / name]).video
    np.testing.assert_allclose(np.asarray(reader(tmp_path / name)), np.asarray(RED), atol=8)


@every_reader
@pytest.mark.parametrize("name", ["a.png", "a.tiff", "a.pgm"])
def test_sixteen_bits_are_scaled(reader: Any, name: str, tmp_path: Path) -> None:
    levels = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(levels).save(tmp_path / name)
    own = np.asarray(reader(tmp_path / name))
    assert (own == np.arange(256).reshape(16, 16, 1)).all()


def test_pixels_without_a_scale_are_refused(tmp_path: Path) -> None:
    for k, levels in enumerate(
        (np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70_000, np.int32), -np.ones((4, 4), np.int32))
    ):
        Image.fromarray(levels).save(tmp_path / f"{k}.tiff")
        with pytest.raises(ConfigError, match=rf"cannot read picture .*{k}\.tiff.*8 or 16 bits"):
            media.still(tmp_path / f"{k}.tiff")


def cut(data: bytes, share: float) -> bytes:
    return data[: int(len(data) * share)]


def encoded(kind: str, **more: Any) -> bytes:
    out = io.BytesIO()
    noise = [Image.fromarray(np.random.RandomState(k).randint(0, 255, (40, 40, 3), dtype=np.uint8)) for k in range(6)]
    noise[0].save(out, kind, **({"save_all": True, "append_images": noise[1:]} if kind in ("GIF", "WEBP") else {}))
    return out.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"
ODD = {
    "empty.png": b"",
    "text.jpg": b"hello",
    "eps.png": EPS,
    "eps.eps": EPS,
    "icon.png": b"\0\0\1\0\1\0" + b"\1" * 30,
    "half.gif": cut(encoded("GIF"), 0.1),
    "late.gif": cut(encoded("GIF"), 0.95),
    "cut.png": cut(encoded("PNG"), 0.5),
    "cut.jpg": cut(encoded("JPEG"), 0.3),
    "cut.webp": cut(encoded("WEBP"), 0.5),
    "broken.png": encoded("PNG").replace(b"IDAT", b"IDAX"),
    "bomb.png": encoded("PNG")[:16] + (2**15).to_bytes(4, "big") * 2 + encoded("PNG")[24:],
}


@pytest.mark.parametrize("name", ODD)
def test_what_is_no_picture_is_one_line(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any, **rest: Any) -> None:
        raise AssertionError("an interpreter was called")

    for function in ("check_call", "run", "Popen"):
        monkeypatch.setattr(subprocess, function, never)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # Tasks of lmms-eval set it for the whole process.
    (tmp_path / name).write_bytes(ODD[name])
    with pytest.raises(ConfigError, match=rf"cannot read picture .*{name}") as caught:
        media.read([tmp_path / name])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "/".join(["x" * 200] * 40), "no.png", ""])
@every_reader
def test_paths_that_cannot_be_opened(reader: Any, path: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot read picture|holds no pictures|is a folder") as caught:
        reader(Path(path))
    assert len(str(caught.value)) < 600


def test_a_folder_of_frames_opens_what_it_shows(tmp_path: Path) -> None:
    for k in range(20):
        (tmp_path / f"{k:02d}.png").write_bytes(b"no picture")
    (tmp_path / "eps.eps").write_bytes(EPS)
    for k in (5, 15):
        RED.save(tmp_path / f"{k:02d}.png")
    assert len(media.read([tmp_path], frames=2).pictures) == 2


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "no"])
def test_data_that_cannot_be_opened(path: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"image": "\xff"}')
    for given, words in ((path, "no data"), (str(tmp_path / "a.jsonl"), "cannot read")):
        with pytest.raises(ConfigError, match=words) as caught:
            samples.read(given)
        assert len(str(caught.value)) < 600
    (tmp_path / "a.jsonl").write_text(json.dumps({"image": path, "question": "?"}))
    with pytest.raises(ConfigError, match="line 1: no picture"):
        samples.read(str(tmp_path / "a.jsonl"))
    with pytest.raises(ConfigError, match=r"cannot read video|PyAV"):
        prompts.clip(path + ".mp4", 8)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_a_long_animation_is_not_kept_whole(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = [Image.new("RGB", (8, 8), (k, 0, 0)) for k in range(0, 240, 6)]
    file = tmp_path / f"a.{kind.lower()}"
    many[0].save(file, kind, save_all=True, append_images=many[1:], **({"lossless": True} if kind == "WEBP" else {}))
    converted = []
    real = media.rgb
    monkeypatch.setattr(media, "rgb", lambda picture: converted.append(1) or real(picture))
    found = media.read([file], frames=8)
    assert found.video and len(converted) == 8
    assert [p.getpixel((0, 0)) for p in found.pictures] == [(6 * (2 + 5 * k), 0, 0) for k in range(8)]
    if kind != "PNG":
        shown = prompts.clip(str(file), 3)
        assert len(converted) == 8 + 3 and shown.indices == (0, 20, 39) and shown.total == 40
        assert [p.getpixel((0, 0))[0] for p in shown.frames] == [0, 120, 234]
    with Image.open(file) as same:
        assert len([1 for _ in ImageSequence.Iterator(same)]) == 40


@pytest.mark.parametrize("family", tiny.families(varlen=True, by_rows=False))
def test_what_an_image_processor_refuses_is_one_line(family: str, tmp_path: Path) -> None:
    stock, file = processor(family), tmp_path / "thin.png"
    Image.new("RGB", (600, 2)).save(file)
    chat = [{"role": "user", "content": [{"type": "image", "url": str(file)}, {"type": "text", "text": "w3"}]}]
    for ask in (
        lambda: samples.prepare(None, stock, samples.Sample(file, "w3")),
        lambda: prompts.encode(stock, [prompts.from_chat(chat, 8)], None),
        lambda: processors.apply(stock.image_processor, "thin.png", images=[media.still(file)]),
    ):
        with pytest.raises(UnsupportedError, match=r"does not take .*: absolute aspect ratio must be smaller than 200"):
            ask()


@pytest.mark.parametrize("kind", clips.CODECS)
def test_video_files(kind: str, tmp_path: Path) -> None:
    file = clips.write(tmp_path, kind).rename(tmp_path / f"clip{kind.upper()}")
    found = media.read([file], frames=4)
    assert found.video and found.items == 1
    levels = [picture.getpixel((32, 32))[0] for picture in found.pictures]
    assert levels == pytest.approx([30, 90, 150, 210], abs=12)
    file.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match=r"cannot read video .*clip"):
        media.read([file])


def test_video_files_say_what_they_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ConfigError, match=r"a\.mp4: video files are decoded by PyAV: pip install 'av>=12,<16'"):
        media.read([tmp_path / "a.mp4"])
