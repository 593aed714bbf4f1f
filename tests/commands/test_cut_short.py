"""Ctrl-C and a full disk: what is left is named, and how to go on. Progress where nobody watches a bar."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm
from tqdm.auto import tqdm as auto

from vtoken.cli import main
from vtoken.commands import bench, calibrate, demo, sweep, tune
from vtoken.commands import eval as eval_command
from vtoken.evals import reference
from vtoken.evals.shared import bars
from vtoken.evals.shared.bars import progress, terminal_only


def cut(monkeypatch: Any, module: Any, error: BaseException) -> None:
    def run(settings: Any) -> None:
        raise error

    monkeypatch.setattr(module, "run", run)


FULL = OSError(errno.ENOSPC, "No space left on device")
CASES = [
    (
        sweep,
        "sweep",
        "out",
        ["sweep.yaml"],
        ["points/a.json", "points/b.json"],
        "2 finished points are kept in {}/points",
    ),
    (eval_command, "eval", "vtoken-eval", ["tiny-llava"], ["results.json"], "vtoken eval does not go on"),
    (
        tune,
        "tune",
        "vtoken-tune",
        ["tiny-llava", "--space", "s.yaml"],
        ["study.db"],
        "finished trials are kept in {}/study.db",
    ),
]


@pytest.mark.parametrize(
    ("module", "name", "folder", "words", "files", "message"), CASES, ids=[case[1] for case in CASES]
)
def test_what_is_kept_is_named(
    module: Any, name: str, folder: str, words: list[str], files: list[str], message: str,
    tmp_path: Path, monkeypatch: Any, capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    words = [name, *words, "--out", folder]
    cut(monkeypatch, module, KeyboardInterrupt())
    assert main(words) == 130
    assert capsys.readouterr().err == "vtoken: interrupted; nothing was kept\n"
    for file in files:
        (tmp_path / folder / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / file).write_text("{}")
    assert main(words) == 130
    out, err = capsys.readouterr()
    assert out == "" and message.format(folder) in err
    cut(monkeypatch, module, FULL)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert err.startswith("vtoken: error: [Errno 28] No space left on device (") and message.format(folder) in err
    cut(monkeypatch, module, FileNotFoundError(errno.ENOENT, "No such file", "x"))
    assert main(words) == 2 and message.format(folder) not in capsys.readouterr().err


def test_thresholds_go_on_and_other_calibrations_do_not(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    cut(monkeypatch, calibrate, KeyboardInterrupt())
    Path("t.safetensors").write_bytes(b"")
    words = ["tiny-llava", "--images", ".", "--budget", "low", "-o", "t.safetensors"]
    assert main(["calibrate", "dtome", *words]) == 130
    assert "kept in t.safetensors; the same command goes on from it" in capsys.readouterr().err
    assert main(["calibrate", "vtw", "tiny-llava"]) == 130
    assert "nothing was kept" in capsys.readouterr().err


def test_commands_of_a_moment_say_nothing(monkeypatch: Any, capsys: Any) -> None:
    cut(monkeypatch, demo, KeyboardInterrupt())
    assert main(["demo"]) == 130 and capsys.readouterr().err == ""


def test_progress_off_a_terminal_is_a_line_every_few_seconds(monkeypatch: Any, capsys: Any) -> None:
    now = iter([100.0, 101.0, 105.5, 107.0, 111.0])
    monkeypatch.setattr(bars.time, "monotonic", lambda: next(now))
    with progress() as tell:
        for what, share in (("dense", 0.1), ("dense", 0.2), ("random:64", 0.3), ("random:64", 0.4)):
            tell(what, share)
    out, err = capsys.readouterr()
    assert out == "" and err == "   6 s   20%  dense\n  11 s   40%  random:64\n"


def test_what_is_done_inside_has_the_share_of_the_whole(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr(bars, "EVERY", 0)
    with progress() as tell:
        tell("0 of 4 points", 0.25)
        with progress() as inner:
            inner("dense: 3 of 4", 0.75)
    with progress(shown=False) as tell, progress() as inner:
        tell("nothing", 0.5)
        inner("nothing", 0.5)
    err = capsys.readouterr().err
    assert [line.split("s ", 1)[1] for line in err.splitlines()] == ["  25%  0 of 4 points", "  25%  dense: 3 of 4"]
    assert bars._telling == []


def test_bars_of_other_packages_are_off(capsys: Any) -> None:
    """Also where they are asked for, as lmms-eval does; and afterwards all is as it was."""
    stock = tqdm.__init__

    def loops() -> str:
        list(tqdm(range(3), disable=False))
        list(auto(range(3), desc="of transformers and datasets"))
        return str(capsys.readouterr().err)

    assert "3/3" in loops()
    with terminal_only():  # pytest is no terminal
        assert loops() == ""
    with progress():
        assert loops() == ""
    with pytest.raises(KeyboardInterrupt), progress():
        raise KeyboardInterrupt
    assert tqdm.__init__ is stock and "3/3" in loops()


def test_bars_on_a_terminal_are_one(monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setattr("rich.console.Console.is_terminal", True)
    with progress() as tell:
        tell("dense", 0.5)
        list(tqdm(range(3)))
    err = capsys.readouterr().err
    assert "dense" in err and "3/3" not in err


def test_few_rounds_say_what_their_quartiles_are_worth() -> None:
    assert bench._conditions({"repeats": 4}) == ["repeats: 4"]
    assert bench._conditions({"repeats": 3}) == [
        "repeats: 3",
        "quartiles of fewer than 4 rounds are drawn between single ones; take more --repeats",
    ]


def test_transformers_bars_do_not_leak(capfd: Any) -> None:
    capfd.readouterr()
    reference.load("tiny-llava")
    assert "Loading weights" not in capfd.readouterr().err
    stock = tqdm.__init__
    with terminal_only(shown=True):
        assert tqdm.__init__ is stock
