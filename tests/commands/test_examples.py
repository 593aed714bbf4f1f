"""The examples of --help, of every command and method: they parse, their pipelines exist, and the cheap ones run."""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pkgutil import iter_modules

import pytest
from PIL import Image

from vtoken import config
from vtoken.cli import COMMANDS, _parser, main
from vtoken.evals import calibrate

METHODS = [found.name for found in iter_modules(calibrate.__path__) if not found.name.startswith("_")]
PAGES = [[], *([name] for name in COMMANDS), *(["calibrate", method] for method in METHODS)]
# What makes an example cheap: run so, or with a smaller question.
CHEAP = {
    "vtoken list": [],
    "vtoken list --json": [],
    "vtoken list fastervlm-64": [],
    "vtoken list --site tokens --fact keys": [],
    "vtoken list --markdown": [],
    "vtoken list --markdown short": [],
    "vtoken schema": [],
    "vtoken flops tiny-llava --json": [],
    "vtoken show tiny-llava fastervlm:32 picture.jpg": [],
    "vtoken calibrate vtw tiny-llava": ["--limit", "6"],
    "vtoken calibrate streaming tiny-llava --induction 0.25 -o heads.json": [],
}


def examples(page):
    """Command lines of a page, without what is said about them, pipes and redirections."""
    if page[:1] == ["calibrate"] and len(page) == 2:
        text = import_module(f"vtoken.evals.calibrate.{page[1]}").EXAMPLES
    elif page:
        text = import_module(f"vtoken.commands.{page[0].replace('-', '_')}").EXAMPLES
    else:
        from vtoken.cli import EXAMPLES as text
    lines = [line.strip() for line in text.partition("examples:")[2].splitlines() if line.startswith("  vtoken ")]
    return [re.split(r"\s{2,}|\s[|>]\s|\s#", line)[0] for line in lines]


EVERY = list(dict.fromkeys(line for page in PAGES for line in examples(page)))


@pytest.mark.parametrize("page", PAGES, ids=" ".join)
def test_every_page_has_some(page):
    assert examples(page)


@pytest.mark.parametrize("line", [line for line in EVERY if not line.endswith("--help")])
def test_they_parse(line):
    words = shlex.split(line)[1:]
    args = _parser(words[0]).parse_args(words)
    pipelines = [*(getattr(args, "pipelines", None) or []), getattr(args, "pipeline", None)]
    for pipeline in pipelines:
        if pipeline is not None and not pipeline.endswith((".yaml", ".safetensors")):
            config.load(pipeline)


def test_cheap_ones_are_examples():
    assert set(CHEAP) <= set(EVERY)


@pytest.mark.parametrize("line", CHEAP)
def test_they_run(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (64, 48), (200, 40, 40)).save("picture.jpg")
    assert main([*shlex.split(line)[1:], *CHEAP[line]]) == 0
    out, err = capsys.readouterr()
    assert "error" not in err.lower() and (out or err)
