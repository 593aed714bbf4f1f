"""Processors without their video half, and the torchvision that it needs."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_processors
import transformers
from PIL import Image

from vtoken.evals.processors import pictures_only
from vtoken.evals.shared.torchvision import fitting

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", ["LlavaNextVideoProcessor", "LlavaOnevisionProcessor", "Qwen2VLProcessor"])
def test_the_video_half_is_left_out_wherever_it_stands(name: str, tmp_path: Path) -> None:
    """The first class asks for it before everything else."""
    images, tokenizer = transformers.CLIPImageProcessorPil(), tiny_processors.tokenizer("<image>", "<video>")
    kind = pictures_only(getattr(transformers, name))
    processor = kind(image_processor=images, tokenizer=tokenizer)
    assert (processor.image_processor, processor.tokenizer) == (images, tokenizer)
    assert not hasattr(processor, "video_processor")
    processor.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path, backend="pil")
    assert type(again).__name__ == name and type(again.image_processor) is type(images)


def test_the_torchvision_that_belongs_to_a_torch() -> None:
    """As in torchvision's table of releases."""
    known = {"2.0.1": "0.15", "2.4.0": "0.19", "2.11.0+cu128": "0.26", "2.13.0+cpu": "0.28", "3.0.0": "", "1.13.1": ""}
    assert {torch: fitting(torch) for torch in known} == known


def test_a_broken_torchvision_is_one_line(tmp_path: Path) -> None:
    """A real one says in forty lines that an operator does not exist, from wherever transformers imports it first."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist\\nmore')\n")
    (tmp_path / "torchvision-0.20.1.dist-info").mkdir()
    about = "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.20.1\n"
    (tmp_path / "torchvision-0.20.1.dist-info" / "METADATA").write_text(about)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    for words in (["show", "tiny-llava", "uniform:4", "a.png"], ["bench", "tiny-llava", "uniform:4"]):
        ran = subprocess.run(
            [sys.executable, "-m", "vtoken", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        printed = [line for line in ran.stderr.splitlines() if "torchvision" in line]
        assert ran.returncode == 2 and "Traceback" not in ran.stderr
        assert len(printed) == 1 and re.fullmatch(
            r"vtoken: error: torchvision 0\.20\.1 does not go with torch 2\S+ \(operator torchvision::nms does not exist\): "
            r'pip install "torchvision==0\.\d+\.\*", or uninstall torchvision',
            printed[0],
        )
